# What these classes are when record.py is compiled: objects with C fields. Uncompiled runs do not read this file.
from libc.stdint cimport int64_t


cdef class Tally:
    cdef public str action, reason, fragment
    cdef public object rule
    cdef public list closed


cdef class Histogram:
    cdef public str name
    cdef public tuple bounds
    cdef public list counts
    cdef public double total


cdef class Clock:
    cdef public int64_t offset_ns
    cdef int64_t _second
    cdef str _text


cdef class Counts:
    cdef public object tallies
    cdef public int64_t opened, bytes_up, bytes_down, failed, dropped_records
    cdef public dict protocols, audit_denied
    cdef public Histogram duration, first_byte, connect, lag
