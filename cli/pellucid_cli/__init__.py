"""The pellucid command: what people type and read.

Belongs here: arguments, tables, colours, exit statuses, and the lab that shows the product at work in network namespaces.
Does not: policy (pellucid_policy) and the data path (pellucid_proxy), which know nothing of this package.
"""
