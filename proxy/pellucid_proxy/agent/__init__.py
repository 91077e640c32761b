"""The process that feeds a node: policy from its source to workers and kernel, and back metrics, status and flow records.

Belongs here: watching, building, applying in order, reporting. Does not: how a flow is decided (pellucid_policy), how rules are written
(kernel), who starts whom (supervisor). One asyncio loop, on uvloop; nothing in it waits for a disk or a program: threads do.
"""
