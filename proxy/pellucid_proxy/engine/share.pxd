# What Share is when share.py is compiled: an object with C fields. Uncompiled runs do not read this file.

cdef class Share:
    cdef public bytes pod
    cdef public int connections, pending
    cdef public long long held
