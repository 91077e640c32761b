"""What the first bytes of a connection say: bytes in, a value, None (more bytes needed) or ValueError (never) out.

Here belong parsers of what a client sends before anything is decided, and the builders of what it is refused with.
No sockets, no clock, no policy. The data path uses first_bytes.sniff and refusal.refusal; a session also http_head.

Every module compiles by Cython and runs the same as plain Python. A parser that is fed a prefix of its input says None
or what it says of the whole, never anything else.
"""
