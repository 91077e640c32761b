"""Pellucid's policy: the API's types, and the pure functions from manifests to verdicts.

Belongs here: model, parse, compile, decide. Does not: sockets, files, clocks, Kubernetes clients (import-linter holds it).
"""
