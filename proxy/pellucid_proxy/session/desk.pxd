# What Desk is when desk.py is compiled: an object with C fields. Uncompiled runs do not read this file.
from .record cimport Clock, Counts


cdef class Desk:
    cdef public Counts counts
    cdef public Clock clock
    cdef public Py_ssize_t unsent
    cdef public object tick
    cdef object _judge, _on_records
    cdef str _node
    cdef Py_ssize_t _limit, _waiting
    cdef list _records
