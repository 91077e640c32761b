# What Tally is when record.py is compiled: an object with C fields. Uncompiled runs do not read this file.

cdef class Tally:
    cdef public str action, reason, fragment
    cdef public object rule
    cdef public list closed
    cdef public Py_ssize_t audited
