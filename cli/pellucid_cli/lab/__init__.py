"""Pods, a node and servers on one machine, in namespaces of their own: for the lab, the demo, the benchmarks and the tests.

Belongs here: what builds and tears down that small network. Does not belong here: anything that a real node needs.
"""
