# What Session is when session.py is compiled: an object with C fields. Uncompiled runs do not read this file.

from pellucid_proxy.engine.share cimport Share

cdef class Session:
    cdef public Share share
    cdef public object judge, source, destination, identity, verdict, audited, tally, name, protocol, held
    cdef public object target, handshake, guard
    cdef public bint spoof, redial, encrypted, mismatch, too_many, unknown, waited
    cdef public int port

    cpdef int opened(self) except -1
    cpdef int received(self, bytes data) except -1
    cpdef int silent(self) except -1
    cpdef int server_spoke(self) except -1
    cpdef int gave_up(self) except -1
    cpdef bint known(self) except -1
    cpdef found(self)
    cpdef int expired(self) except -1
    cdef int _believe(self, first, bytes data) except -1
    cdef int _settle(self, name, bint encrypted, bint mismatch) except -1
    cdef object _verdict(self, name, bint encrypted, bint mismatch)
    cdef object _aim(self, verdict)
    cdef bint _depends_on_name(self) except -1
    cdef int _guard(self, bytes data) except -1
    cpdef int review(self) except -1
    cdef bint _still_allowed(self) except -1
