"""`kubectl pellucid`: a plug-in of kubectl, which it asks for everything that it needs of the cluster."""
