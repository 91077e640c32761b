"""One connection's way from first fact to last record, without I/O: events in, the next step out.

Belongs here: what may be decided when, upstream proxies' handshakes, the check of every plain HTTP request, flow records' text.
Does not: sockets, clocks, files (import-linter holds it). The engine calls a session and does what it says.
"""
