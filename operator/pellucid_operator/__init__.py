"""The operator: objects of the cluster in, snapshots, the DaemonSet and statuses out."""
