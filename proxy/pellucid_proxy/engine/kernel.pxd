# The system calls of the engine, as C. Included into relay.c when relay.py is compiled; kernel.py is the same for uncompiled runs.
# All return what the call returns, or -errno. Only check_signals raises, only wait blocks.
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.exc cimport PyErr_CheckSignals
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <arpa/inet.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef IPV6_TRANSPARENT
    #define IPV6_TRANSPARENT 75
    #endif
    """
    enum: EAGAIN, EINTR, EINPROGRESS, EINVAL, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLLERR, EPOLLHUP, MSG_MORE
    enum: EPOLLET_ "EPOLLET", EPOLLEXCLUSIVE_ "EPOLLEXCLUSIVE", EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    enum: F_SETPIPE_SZ, O_NONBLOCK, O_CLOEXEC, SPLICE_F_MOVE, SPLICE_F_NONBLOCK
    enum: AF_INET, AF_INET6, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, SOL_SOCKET, SO_LINGER, SO_MARK
    enum: SOL_IP, SOL_IPV6, IP_TRANSPARENT, IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT
    enum: SOL_TCP, TCP_NODELAY, TCP_QUICKACK, MSG_NOSIGNAL, SHUT_WR, CLOCK_MONOTONIC

    ctypedef unsigned int socklen_t
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr:
        pass
    struct sockaddr_in:
        uint16_t sin_family, sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_family, sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    struct linger:
        int l_onoff, l_linger
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data

    uint16_t htons(uint16_t)
    uint16_t ntohs(uint16_t)
    int c_accept4 "accept4"(int, sockaddr *, socklen_t *, int)
    int c_bind "bind"(int, sockaddr *, socklen_t)
    int c_clock_gettime "clock_gettime"(int, timespec *)
    int c_close "close"(int)
    int c_connect "connect"(int, sockaddr *, socklen_t)
    int c_epoll_ctl "epoll_ctl"(int, int, int, epoll_event *)
    int c_epoll_wait "epoll_wait"(int, epoll_event *, int, int) nogil
    int c_fcntl "fcntl"(int, int, int)
    int c_getsockname "getsockname"(int, sockaddr *, socklen_t *)
    int c_pipe2 "pipe2"(int *, int)
    int c_setsockopt "setsockopt"(int, int, int, void *, socklen_t)
    int c_shutdown "shutdown"(int, int)
    int c_socket "socket"(int, int, int)
    ssize_t c_recv "recv"(int, void *, size_t, int)
    ssize_t c_send "send"(int, void *, size_t, int)
    ssize_t c_splice "splice"(int, void *, int, void *, size_t, unsigned int)

ctypedef sockaddr_in6 address  # holds a sockaddr_in as well; opaque to the engine
ctypedef epoll_event[512] event_list
cdef enum:
    EVENTS = 512
    EPOLLET = 1 << 31
    EPOLLEXCLUSIVE = 1 << 28

cdef struct accepted:
    int fd
    address source

cdef struct pipe_ends:
    int source, sink


cdef inline Py_ssize_t result(Py_ssize_t value) noexcept:
    return -errno if value < 0 else value


cdef inline int option(int fd, int level, int name, int value) noexcept:
    return c_setsockopt(fd, level, name, &value, sizeof(value))


cdef inline int64_t clock_ns() noexcept:
    """Monotonic time."""
    cdef timespec now
    c_clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec


cdef inline int wait(int epoll, event_list events, int timeout_ms, bint alone) noexcept:
    """The one call that may block. Gives up the GIL meanwhile, unless the caller is alone in its process."""
    cdef int count
    if alone:
        count = c_epoll_wait(epoll, events, EVENTS, timeout_ms)
    else:
        with nogil:
            count = c_epoll_wait(epoll, events, EVENTS, timeout_ms)
    return <int>result(count)


cdef inline int check_signals() except -1:
    """Run the Python handlers of signals that came."""
    return PyErr_CheckSignals()


cdef inline int control(int epoll, int operation, int fd, unsigned int events) noexcept:
    cdef epoll_event event
    event.events, event.data.fd = events, fd
    return <int>result(c_epoll_ctl(epoll, operation, fd, &event))


cdef inline int watch(int epoll, int fd, unsigned int events) noexcept:
    return control(epoll, EPOLL_CTL_ADD, fd, events)


cdef inline int rewatch(int epoll, int fd, unsigned int events) noexcept:
    return control(epoll, EPOLL_CTL_MOD, fd, events)


cdef inline int unwatch(int epoll, int fd) noexcept:
    return control(epoll, EPOLL_CTL_DEL, fd, 0)


cdef inline accepted accept(int listener) noexcept:
    cdef accepted new
    cdef socklen_t size = sizeof(new.source)
    new.fd = <int>result(c_accept4(listener, <sockaddr *>&new.source, &size, SOCK_NONBLOCK | SOCK_CLOEXEC))
    return new


cdef inline address local_name(int fd) noexcept:
    cdef address local
    cdef socklen_t size = sizeof(local)
    c_getsockname(fd, <sockaddr *>&local, &size)
    return local


cdef inline bytes packed(address which):
    """The IP address alone: 4 or 16 bytes."""
    if which.sin6_family == AF_INET:
        return PyBytes_FromStringAndSize(<char *>&(<sockaddr_in *>&which).sin_addr, 4)
    return PyBytes_FromStringAndSize(<char *>&which.sin6_addr, 16)


cdef inline int port(address which) noexcept:
    return ntohs(which.sin6_port)  # at the same place in sockaddr_in


cdef inline address made(bytes ip, int number) noexcept:
    cdef address new
    memset(&new, 0, sizeof(new))
    new.sin6_port = htons(<uint16_t>number)
    if PyBytes_GET_SIZE(ip) == 4:
        new.sin6_family = AF_INET
        memcpy(&(<sockaddr_in *>&new).sin_addr, PyBytes_AS_STRING(ip), 4)
    else:
        new.sin6_family = AF_INET6
        memcpy(&new.sin6_addr, PyBytes_AS_STRING(ip), 16)
    return new


cdef inline socklen_t length(address *which) noexcept:
    return sizeof(sockaddr_in) if which.sin6_family == AF_INET else sizeof(sockaddr_in6)


cdef inline int dial(address source, bint spoof, address destination, unsigned int mark, bint client_first) noexcept:
    """The descriptor of a socket that connects to destination, or -errno.

    spoof: from the IP address of source, any port; it must be of destination's family. mark: SO_MARK.
    client_first: bytes wait to be sent, so that the handshake's ACK can leave with them: one packet and one wake-up less.
    """
    cdef int fd = c_socket(destination.sin6_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error = 0
    if fd < 0:
        return -errno
    if mark and option(fd, SOL_SOCKET, SO_MARK, <int>mark):
        error = errno  # without the mark the proxy could catch its own connection
    elif spoof:
        source.sin6_port = 0
        if source.sin6_family != destination.sin6_family:
            error = EINVAL
        elif option(fd, SOL_IP, IP_TRANSPARENT, 1) if source.sin6_family == AF_INET else option(fd, SOL_IPV6, IPV6_TRANSPARENT, 1):
            error = errno
        else:
            option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)  # otherwise bind() reserves a port for all destinations at once
            if c_bind(fd, <sockaddr *>&source, length(&source)):
                error = errno
    if client_first:
        option(fd, SOL_TCP, TCP_QUICKACK, 0)
    if not error and c_connect(fd, <sockaddr *>&destination, length(&destination)) and errno != EINPROGRESS:
        error = errno
    if error:
        c_close(fd)
        return -error
    return fd


cdef inline Py_ssize_t recv(int fd, bytearray buffer, Py_ssize_t size) noexcept:
    return result(c_recv(fd, PyByteArray_AS_STRING(buffer), size, 0))


cdef inline Py_ssize_t send(int fd, bytearray buffer, Py_ssize_t count, int flags) noexcept:
    return result(c_send(fd, PyByteArray_AS_STRING(buffer), count, flags | MSG_NOSIGNAL))


cdef inline Py_ssize_t send_rest(int fd, bytes data, Py_ssize_t at, int flags) noexcept:
    return result(c_send(fd, PyBytes_AS_STRING(data) + at, PyBytes_GET_SIZE(data) - at, flags | MSG_NOSIGNAL))


cdef inline bytes taken(bytearray buffer, Py_ssize_t start, Py_ssize_t stop):
    return PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer) + start, stop - start)


cdef inline Py_ssize_t splice(int source, int sink, Py_ssize_t count) noexcept:
    return result(c_splice(source, NULL, sink, NULL, count, SPLICE_F_MOVE | SPLICE_F_NONBLOCK))


cdef inline pipe_ends pipe(int size) noexcept:
    cdef int ends[2]
    cdef pipe_ends new
    if c_pipe2(ends, O_NONBLOCK | O_CLOEXEC):
        new.source = new.sink = -1
        return new
    if size:
        c_fcntl(ends[0], F_SETPIPE_SZ, size)
    new.source, new.sink = ends[0], ends[1]
    return new


cdef inline int no_delay(int fd) noexcept:
    return option(fd, SOL_TCP, TCP_NODELAY, 1)


cdef inline int end_stream(int fd) noexcept:
    return <int>result(c_shutdown(fd, SHUT_WR))


cdef inline int close(int fd) noexcept:
    return c_close(fd)


cdef inline int reset_on_close(int fd) noexcept:
    cdef linger at_once
    at_once.l_onoff, at_once.l_linger = 1, 0
    return c_setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once))
