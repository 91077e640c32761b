"""The engine and the relay: one epoll, connections as objects, no Python call per event when compiled.

This file is Python and runs as it is; Cython 3 compiles the same file to C. What is C then:
  @cython.cclass       an object with C fields and a table of methods instead of a dictionary
  @cython.cfunc        a C function, called by C only
  @cython.ccall        a C function that Python may call, and that a Python subclass may override
  name: cython.int     a C field, argument or variable
  @cython.exceptval(check=False)   it does not raise; otherwise C asks after every call whether Python has an error
Everything that touches the kernel is in kernel (kernel.pxd compiled, kernel.py not). It returns -errno; nothing here raises
on the way of the bytes. Python is called twice for a connection: a session decides about it (session/session.py), and the
worker hears how it ended.

Edge-triggered: an event says that something changed, once. So a handler goes on until the source is empty or the target
is full, or else asks for another event.

The states of a connection, each left by an event or by its queue's time-out:
  WAITING    no verdict yet                                    queues silent, then waiting; unknown while its pod is not known
  RACING     dialled without a verdict: who speaks first?      queue idle
  DIALING    allowed, the upstream is not there yet            queue connecting
  GREETING   talking to an upstream proxy (CONNECT, SOCKS5)    queue connecting
  RELAYING   both sides open                                   queue idle
  LINGERING  a refusal was sent, the client's end is awaited   queue lingering
  HOLDING    dropped: neither answered nor reset               queue holding
"""

from __future__ import annotations  # uncompiled, a class may name itself in its own fields

import cython

from ..sniff.first_bytes import MAX_FIRST_BYTES

if cython.compiled:
    from cython.cimports.libc.stdint import int64_t
    from cython.cimports.pellucid_proxy.engine import kernel
    from cython.cimports.pellucid_proxy.engine.kernel import (
        EAGAIN,
        EINTR,
        EPOLLERR,
        EPOLLET,
        EPOLLEXCLUSIVE,
        EPOLLHUP,
        EPOLLIN,
        EPOLLOUT,
        EPOLLPRI,
        EPOLLRDHUP,
        MSG_MORE,
    )
    from cython.cimports.pellucid_proxy.engine.share import Share
else:
    from . import kernel
    from .kernel import (
        EAGAIN,
        EINTR,
        EPOLLERR,
        EPOLLET,
        EPOLLEXCLUSIVE,
        EPOLLHUP,
        EPOLLIN,
        EPOLLOUT,
        EPOLLPRI,
        EPOLLRDHUP,
        MSG_MORE,
    )
    from .share import Share

    int64_t = cython.longlong

compiled = cython.compiled

READABLE = cython.declare(cython.uint, EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET)
# Then other connections get their turn
ACCEPTS_PER_EVENT = cython.declare(cython.int, 8)
EXPIRED_PER_BATCH = cython.declare(cython.int, 32)  # of each queue
STEPS_PER_TURN = cython.declare(cython.int, 32)
BYTES_PER_TURN = cython.declare(cython.int, 1048576)
SHORT_READ = cython.declare(cython.int, 4096)  # a read that returned less than this has emptied the socket
BULK_READ = cython.declare(cython.int, 16384)  # a read that returned this much makes the direction worth splicing
FIRST_READ = cython.declare(cython.int, 16384)
ENOUGH = cython.declare(cython.int, MAX_FIRST_BYTES)  # to decide by
TIGHT_READ = cython.declare(cython.int, 4096)  # where too much waits already: at most this is added by a direction
BUFFER_SIZE = cython.declare(cython.int, 262144)
PIPE_SIZE = cython.declare(cython.int, 1 << 20)
PIPE_COST = cython.declare(cython.int, 65536)  # what a lent pipe counts as at least: it has two descriptors and pages
IDLE_PIPES = cython.declare(cython.int, 256)  # kept open for reuse; more are closed
# How long nothing is accepted when there are too many connections or descriptors, unless ROOM connections end before
ROOM = cython.declare(cython.int, 16)
PAUSE_MS = cython.declare(cython.int, 100)
PAUSE_NS = cython.declare(cython.longlong, 100_000_000)
LAG_NS = cython.declare(cython.longlong, 100_000)  # a batch of events that took longer is reported one by one
REVIEWS_PER_BATCH = cython.declare(cython.int, 256)  # connections decided again; then events get their turn
IDLE_LOOKS = cython.declare(cython.int, 8)  # an idle time-out is noticed at most 1/8 late

GO_ON = cython.declare(cython.int, 0)
DRAINED = cython.declare(cython.int, 1)  # the source is empty
BLOCKED = cython.declare(cython.int, 2)  # the target is full
TURN_OVER = cython.declare(cython.int, 3)
BROKEN = cython.declare(cython.int, 4)  # the source failed
GONE = cython.declare(cython.int, 5)  # the target failed

WAITING = cython.declare(cython.int, 0)
RACING = cython.declare(cython.int, 1)
DIALING = cython.declare(cython.int, 2)
GREETING = cython.declare(cython.int, 3)
RELAYING = cython.declare(cython.int, 4)
LINGERING = cython.declare(cython.int, 5)
HOLDING = cython.declare(cython.int, 6)

# What a session asks for (session/session.py has the same numbers, a test holds them equal).
WAIT = cython.declare(cython.int, 0)
DIAL = cython.declare(cython.int, 1)
RACE = cython.declare(cython.int, 2)
REFUSE = cython.declare(cython.int, 3)
HOLD = cython.declare(cython.int, 4)

# Why a connection ended (session/ending.py names them).
END = cython.declare(cython.int, 0)
CLIENT_RESET = cython.declare(cython.int, 1)
UPSTREAM_RESET = cython.declare(cython.int, 2)
UPSTREAM_UNREACHABLE = cython.declare(cython.int, 3)
CONNECT_TIMEOUT = cython.declare(cython.int, 4)
IDLE_TIMEOUT = cython.declare(cython.int, 5)
REFUSED = cython.declare(cython.int, 6)
UPSTREAM_PROXY = cython.declare(cython.int, 7)
SHUTDOWN = cython.declare(cython.int, 8)
INTERNAL = cython.declare(cython.int, 9)
POLICY_CHANGED = cython.declare(cython.int, 10)
POD_CHANGED = cython.declare(cython.int, 11)

# Compiled, the numbers above are C's alone; tests hold these equal to the session's.
steps = (WAIT, DIAL, RACE, REFUSE, HOLD)
endings = (
    END,
    CLIENT_RESET,
    UPSTREAM_RESET,
    UPSTREAM_UNREACHABLE,
    CONNECT_TIMEOUT,
    IDLE_TIMEOUT,
    REFUSED,
    UPSTREAM_PROXY,
    SHUTDOWN,
    INTERNAL,
    POLICY_CHANGED,
    POD_CHANGED,
)

buffer = cython.declare(bytearray, bytearray(262144))  # one for all: its content never outlives a handler
idle_pipes = cython.declare(list, [])
pipe_bytes = PIPE_SIZE  # for Python


@cython.cclass
class Handler:
    """Something with a descriptor. A Python subclass works too: an event then costs a Python call."""

    fd: cython.int

    @cython.ccall
    @cython.exceptval(check=False)
    def on_event(self, events: cython.uint) -> cython.int:
        return 0  # every subclass has its own

    def set_fd(self, fd):
        """For Python subclasses: the descriptor this handler stands for; the subclass closes it."""
        self.fd = fd


@cython.cclass
class Queue:
    """Connections that wait for the same length of time, the one that is due first ahead. A connection is in at most one."""

    after: int64_t  # nanoseconds
    first: Client
    last: Client

    def __init__(self, seconds):
        self.after = int(seconds * 1e9)
        self.first = None
        self.last = None


@cython.cclass
class Engine:
    """The loop of one worker. worker is told of connections: worker.session(source, destination, port) makes the
    session that decides, worker.closed(session, …) hears the end. session.share is its pod's. limits: pellucid_proxy.settings.NodeSettings.
    roomy_pipes: how many pipes of PIPE_SIZE it may have open; more hold 64 KiB. most_pipes: how many in all; without one, bytes are copied.

    Owns the epoll descriptor for its lifetime; the listeners' descriptors are the caller's."""

    epoll: cython.int
    alone: cython.bint  # no other thread in this process needs the GIL: keeping it saves 4 % of a round trip
    handlers: list  # by descriptor
    closing: list
    listeners: list
    worker: object
    mark: cython.uint
    now: int64_t  # monotonic nanoseconds at the last return of epoll_wait
    live: cython.int  # connections
    most: cython.int  # ... at once
    held: int64_t  # bytes that wait for peers that do not read, as Share says
    most_held: int64_t
    most_held_of_pod: int64_t
    accepting: cython.bint
    paused: cython.bint
    resume_at: int64_t
    tick_at: int64_t  # when worker.tick() is due, 0: not asked for
    pipes: cython.int  # open ones
    roomy_pipes: cython.int  # so many of PIPE_SIZE, more have the kernel's size
    most_pipes: cython.int
    pauses: int64_t  # how often nothing was accepted for a while
    quick_batches: int64_t  # those that took at most LAG_NS
    to_review: cython.Py_ssize_t  # descriptors still to be looked at since the policy changed
    review_at: cython.Py_ssize_t  # the next of them
    stopping: cython.bint
    idle_ns: int64_t
    unknown: Queue
    silent: Queue
    waiting: Queue
    connecting: Queue
    idle: Queue
    lingering: Queue
    holding: Queue

    def __init__(self, epoll, alone, worker, settings, roomy_pipes=IDLE_PIPES, most_pipes=65536):
        self.epoll = epoll
        self.alone = alone
        self.handlers = []
        self.closing = []
        self.listeners = []
        self.worker = worker
        self.mark = settings.marks.egress
        self.now = kernel.clock_ns()
        self.live = 0
        self.most = settings.max_connections
        self.held = self.pauses = 0
        self.most_held = settings.max_held_bytes
        self.most_held_of_pod = settings.max_held_bytes_per_pod
        self.accepting = self.paused = self.stopping = False
        self.resume_at = self.tick_at = self.quick_batches = 0
        self.pipes = 0
        self.roomy_pipes = roomy_pipes
        self.most_pipes = most_pipes
        self.to_review = self.review_at = 0
        self.idle_ns = int(settings.idle_timeout_s * 1e9)
        self.unknown = Queue(settings.unknown_pod_hold_s)
        self.silent = Queue(settings.server_first_delay_s)
        self.waiting = Queue(settings.first_bytes_timeout_s)
        self.connecting = Queue(settings.connect_timeout_s)
        self.idle = Queue(settings.idle_timeout_s / IDLE_LOOKS)
        self.lingering = Queue(2.0)
        self.holding = Queue(settings.drop_hold_s)

    @property
    def connections(self):
        """How many connections there are now."""
        return self.live

    @property
    def held_bytes(self):
        """How many bytes wait for peers that do not read; a lent pipe counts as 64 KiB at least."""
        return self.held

    @property
    def times_paused(self):
        """How often nothing was accepted for a while, because there were too many connections, or no descriptor or memory was left."""
        return self.pauses

    @property
    def quick(self):
        """How many batches of events took at most 100 microseconds; worker.lagged(nanoseconds) heard of the others."""
        return self.quick_batches

    def tick_within(self, seconds):
        """Have worker.tick() called once, at most seconds from now."""
        if not self.tick_at:
            self.tick_at = self.now + int(seconds * 1e9)

    @cython.ccall
    @cython.exceptval(check=False)
    def watch(self, handler: Handler, events: cython.uint) -> cython.int:
        while handler.fd >= len(self.handlers):
            self.handlers.append(None)
        self.handlers[handler.fd] = handler
        return kernel.watch(self.epoll, handler.fd, events)

    def forget(self, handler: Handler):
        """Report no more events of handler; its descriptor stays open."""
        self.handlers[handler.fd] = None
        kernel.unwatch(self.epoll, handler.fd)

    def listen(self, descriptors):
        """Accept from these listening sockets from now on."""
        fd: cython.int
        for fd in descriptors:
            self.listeners.append(Listener(self, fd))
        self.accepting = True
        self.resume()

    def refuse_more(self):
        """Accept nothing from now on; what is in the sockets' queues stays there for another worker."""
        if self.accepting and not self.paused:
            self.stop_listening()
        self.accepting = False

    def review(self):
        """Have every connection there is now decided again, some of them after each batch of events.

        A round that is under way when the next begins goes on: however fast policies follow each other, each connection's turn comes."""
        self.to_review = len(self.handlers)

    @property
    def reviewing(self):
        """How many descriptors are still to be looked at."""
        return self.to_review

    @cython.cfunc
    @cython.exceptval(check=False)
    def review_some(self) -> cython.int:
        i: cython.int
        for i in range(REVIEWS_PER_BATCH):
            if self.to_review <= 0:
                break
            if self.review_at >= len(self.handlers):
                self.review_at = 0
            handler = self.handlers[self.review_at]
            self.review_at += 1
            self.to_review -= 1
            if isinstance(handler, Client):
                cython.cast(Client, handler).review()
        return 0

    def close_all(self):
        """Reset every connection, with a record each that says Shutdown."""
        for handler in list(self.handlers):
            if isinstance(handler, Client):
                handler.close(True, SHUTDOWN)

    def stop(self):
        """Make run() return after the batch at hand."""
        self.stopping = True

    @cython.cfunc
    @cython.exceptval(check=False)
    def pause(self) -> cython.int:
        """Accept nothing for a while."""
        if self.accepting and not self.paused:
            self.pauses += 1
            self.resume_at = self.now + PAUSE_NS
            self.stop_listening()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def stop_listening(self) -> cython.int:
        """Level-triggered listeners that are not accepted from would be reported without end.

        Nor is one accepted from that is further down in the batch at hand: the worker may end after it."""
        listener: Listener
        self.paused = True
        for listener in self.listeners:
            self.forget(listener)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def resume(self) -> cython.int:
        listener: Listener
        self.paused = False
        for listener in self.listeners:
            self.watch(listener, EPOLLIN | EPOLLEXCLUSIVE)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def close_later(self, handler: Handler) -> cython.int:
        """Forget a descriptor now and close it after the batch.

        Closed at once, its number could be given to a new connection, and an event of the old one that waits
        further down in the same batch would reach the new one."""
        if handler.fd < len(self.handlers):
            self.handlers[handler.fd] = None
        self.closing.append(handler)
        return 0

    @cython.ccall
    @cython.exceptval(check=False)
    @cython.boundscheck(False)
    @cython.wraparound(False)
    def poll(self, timeout_ms: cython.int = -1) -> cython.int:
        """Handle one batch of events, after at most timeout_ms (-1: no limit but the queues'). Their number, or -errno."""
        events = cython.declare(kernel.event_list)
        if not cython.compiled:
            events = []
        i: cython.int
        handler: Handler
        count: cython.int = kernel.wait(self.epoll, events, self.until_due(timeout_ms), self.alone)
        self.now = kernel.clock_ns()
        for i in range(count):
            handler = cython.cast(Handler, self.handlers[events[i].data.fd])  # cast: no type check
            if handler is not None:  # None: an earlier event of this batch closed it
                handler.on_event(events[i].events)
        self.expire(self.unknown)
        self.expire(self.silent)
        self.expire(self.waiting)
        self.expire(self.connecting)
        self.expire(self.idle)
        self.expire(self.lingering)
        self.expire(self.holding)
        if self.to_review:
            self.review_some()
        if self.closing:
            for handler in self.closing:
                kernel.close(handler.fd)
            self.closing.clear()
        if self.paused and self.accepting and self.now >= self.resume_at:
            self.resume()
        self.after_batch()
        return count

    @cython.cfunc
    @cython.exceptval(check=False)
    def after_batch(self) -> cython.int:
        spent: int64_t = kernel.clock_ns() - self.now
        try:
            if spent <= LAG_NS:
                self.quick_batches += 1
            else:
                self.worker.lagged(spent)
            if self.tick_at and self.tick_at <= self.now:
                self.tick_at = 0
                self.worker.tick()
        except Exception:
            self.worker.failed()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def until_due(self, timeout_ms: cython.int) -> cython.int:
        """Milliseconds until the first queue is due, rounded up, at most timeout_ms."""
        if self.to_review:
            return 0
        due: int64_t = -1
        due = self.earlier(due, self.unknown)
        due = self.earlier(due, self.silent)
        due = self.earlier(due, self.waiting)
        due = self.earlier(due, self.connecting)
        due = self.earlier(due, self.idle)
        due = self.earlier(due, self.lingering)
        due = self.earlier(due, self.holding)
        if self.tick_at and (due < 0 or self.tick_at < due):
            due = self.tick_at
        if self.paused and self.accepting and (timeout_ms < 0 or timeout_ms > PAUSE_MS):
            timeout_ms = PAUSE_MS
        if due < 0:
            return timeout_ms
        left: int64_t = (due - self.now) // 1000000 + 1
        if left < 0:
            left = 0
        if timeout_ms >= 0 and timeout_ms < left:
            return timeout_ms
        return cython.cast(cython.int, left)

    @cython.cfunc
    @cython.exceptval(check=False)
    def earlier(self, due: int64_t, queue: Queue) -> int64_t:
        if queue.first is None or (0 <= due <= queue.first.due):
            return due
        return queue.first.due

    @cython.cfunc
    @cython.exceptval(check=False)
    def expire(self, queue: Queue) -> cython.int:
        client: Client
        i: cython.int
        for i in range(EXPIRED_PER_BATCH):
            client = queue.first
            if client is None or client.due > self.now:
                break
            client.leave_queue()
            client.on_timeout(queue)
        return 0

    def run(self):
        """Handle events until stop()."""
        while not self.stopping:
            if self.poll() == -EINTR:
                kernel.check_signals()  # compiled code never looks by itself


@cython.cclass
class Listener(Handler):
    """Level-triggered: what is left after ACCEPTS_PER_EVENT is reported again. Exclusive: one worker wakes for a connection."""

    engine: Engine

    def __init__(self, engine, fd):
        self.engine = engine
        self.fd = fd

    @cython.ccall
    @cython.exceptval(check=False)
    def on_event(self, events: cython.uint) -> cython.int:
        i: cython.int
        for i in range(ACCEPTS_PER_EVENT):
            if self.engine.live >= self.engine.most:
                self.engine.pause()
                break
            new = kernel.accept(self.fd)
            if new.fd < 0:
                if new.fd != -EAGAIN and new.fd != -EINTR:  # out of descriptors or memory; ended in the queue: harmless
                    self.engine.pause()
                break
            client: Client = Client()
            client.source = new.source
            client.no_delay = True  # inherited from the listener
            client.start(self.engine, new.fd)
        return 0


@cython.cclass
class Side(Handler):
    """One socket of a connection, and the bytes on their way from it to its peer."""

    engine: Engine
    share: Share
    peer: Side
    guard: object  # checks what comes from this side before it is passed on, or None
    events: cython.uint  # what epoll reports of this socket; 0: nothing yet
    relaying: cython.uchar  # both sides are open
    closed: cython.uchar
    readable: cython.uchar  # there may be something to read
    hung_up: cython.uchar  # the end of the stream was announced: what is in the socket now is all there is
    read_on: cython.uchar  # a short read proves nothing: it stops at urgent data's mark, and ahead of an error
    no_delay: cython.uchar
    bulk: cython.uchar
    ended: cython.uchar  # the end of the stream was read
    finished: cython.uchar  # ... and passed on to the peer
    blocked: cython.uchar  # the peer's socket is full
    doomed: cython.uchar  # the guard refused: end when what it let pass is sent
    unsent: bytes  # bytes read that the peer did not take, or None
    unsent_at: cython.int
    pipe_source: cython.int  # -1: no pipe
    pipe_sink: cython.int
    in_pipe: cython.Py_ssize_t
    held: cython.int  # what engine and share were told of the two before
    moved: int64_t  # bytes read from this side
    first_at: int64_t  # when the first of them came, 0: none
    active_at: int64_t  # when the last event came

    def __init__(self):
        """No arguments and no super(): then Cython makes the object without packing a tuple. Fields of subclasses are set here too."""
        self.engine = None
        self.share = None
        self.peer = None
        self.guard = None
        self.fd = -1
        self.events = 0
        self.relaying = self.closed = self.readable = self.hung_up = self.read_on = self.no_delay = False
        self.bulk = self.ended = self.finished = self.blocked = self.doomed = False
        self.unsent = None
        self.unsent_at = 0
        self.pipe_source = self.pipe_sink = -1
        self.in_pipe = 0
        self.held = 0
        self.moved = self.first_at = self.active_at = 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def watch(self, events: cython.uint) -> cython.int:
        self.events = events
        return self.engine.watch(self, events)

    @cython.cfunc
    @cython.exceptval(check=False)
    def note(self, events: cython.uint) -> cython.int:
        self.active_at = self.engine.now
        if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.readable = True
        if events & (EPOLLPRI | EPOLLERR):
            self.read_on = True
        elif events & EPOLLRDHUP:
            self.hung_up = True
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def relay(self, events: cython.uint) -> cython.int:
        """An event of a connection whose both sides are open."""
        if events & EPOLLERR and self.ended:
            return self.broken()
        self.note(events)  # after an error: what came before the reset is read first, and then the error
        if self.readable:
            self.pump()
        if events & EPOLLOUT and not self.closed and self.peer.blocked:
            self.peer.pump()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def pump(self) -> cython.int:
        """Move bytes to the peer and see to it that an event comes when it can go on."""
        outcome: cython.int = self.transfer()
        if self.unsent is not None or self.pipe_source >= 0 or self.held:
            self.account()
        if outcome == BROKEN:
            return self.broken()
        if outcome == GONE:
            return self.peer.broken()
        self.blocked = outcome == BLOCKED
        if outcome == TURN_OVER:
            # Arms the edge anew: reported again if still readable
            kernel.rewatch(self.engine.epoll, self.fd, self.events)
        elif outcome == BLOCKED:
            self.peer.ask_for_writable()
        if self.unsent is None and not self.in_pipe:
            if self.doomed:
                return self.close(True, REFUSED)
            if self.ended and not self.finished:
                self.finish()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def account(self) -> cython.int:
        """Tell the engine and the pod's share how much waits here."""
        now: cython.Py_ssize_t = 0
        if self.pipe_source >= 0:
            now = max(PIPE_COST, self.in_pipe)
        if self.unsent is not None:
            now += len(self.unsent) - self.unsent_at
        self.engine.held += now - self.held
        self.share.held += now - self.held
        self.held = now
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def tight(self) -> cython.bint:
        """Whether so much waits already, of this pod or of all, that little more may be read before it can be sent."""
        engine: Engine = self.engine
        return engine.held >= engine.most_held or self.share.held >= engine.most_held_of_pod

    @cython.cfunc
    @cython.exceptval(check=False)
    def transfer(self) -> cython.int:
        i: cython.int
        enough: int64_t = self.moved + BYTES_PER_TURN
        outcome: cython.int = self.flush()
        for i in range(STEPS_PER_TURN):
            if outcome != GO_ON:
                return outcome
            if self.ended or self.doomed or not self.readable:
                return DRAINED
            if self.moved >= enough:
                break
            if self.guard is not None:
                outcome = self.checked_copy()
            elif self.bulk and not self.tight():
                outcome = self.splice_in()
            else:
                if self.pipe_source >= 0:  # empty: flush() says so
                    self.give_pipe_back()
                outcome = self.copy()
            if outcome == GO_ON:
                outcome = self.flush()
        # Never end a turn with bytes in the pipe: the source may be empty now, and then no event would come for them.
        if outcome != GO_ON:
            return outcome
        return TURN_OVER

    @cython.cfunc
    @cython.exceptval(check=False)
    def flush(self) -> cython.int:
        """Send what is on its way. GO_ON if nothing of it is left."""
        count: cython.Py_ssize_t
        if self.unsent is not None:
            count = kernel.send_rest(self.peer.fd, self.unsent, self.unsent_at, 0)
            if count < 0:
                return BLOCKED if count == -EAGAIN else GONE
            self.unsent_at += count
            if self.unsent_at < len(self.unsent):
                return BLOCKED
            self.unsent = None
        while self.in_pipe:
            count = kernel.splice(self.pipe_source, self.peer.fd, self.in_pipe)
            if count < 0:
                return BLOCKED if count == -EAGAIN else GONE
            self.in_pipe -= count
        return GO_ON

    @cython.cfunc
    @cython.exceptval(check=False)
    def received(self, count: cython.Py_ssize_t) -> cython.int:
        """Note what a recv into the buffer returned. GO_ON if it returned bytes."""
        if count < 0:
            self.readable = False
            return DRAINED if count == -EAGAIN else BROKEN
        if count == 0:
            self.ended = True
            return DRAINED
        if not self.moved:
            self.first_at = self.engine.now
        self.moved += count
        self.bulk = count >= BULK_READ
        if count < SHORT_READ and not self.read_on:  # saves the read that would say EAGAIN or end of stream
            self.ended = self.hung_up
            self.readable = False  # new bytes make a new edge
        return GO_ON

    @cython.cfunc
    @cython.exceptval(check=False)
    def copy(self) -> cython.int:
        """Read once and send it at once: for small messages cheaper than two splices."""
        count: cython.Py_ssize_t = kernel.recv(self.fd, buffer, TIGHT_READ if self.tight() else BUFFER_SIZE)
        outcome: cython.int = self.received(count)
        if outcome != GO_ON:
            return outcome
        if not self.peer.no_delay:  # not before the second write: a short connection never needs it
            kernel.no_delay(self.peer.fd)
            self.peer.no_delay = True
        # The end of the stream follows at once: MSG_MORE lets both leave in one packet.
        sent: cython.Py_ssize_t = kernel.send(self.peer.fd, buffer, count, MSG_MORE if self.ended else 0)
        if sent < 0:
            if sent != -EAGAIN:
                return GONE
            sent = 0
        if sent < count:
            self.unsent = kernel.taken(buffer, sent, count)
            self.unsent_at = 0
            return BLOCKED
        return GO_ON

    @cython.cfunc
    @cython.exceptval(check=False)
    def checked_copy(self) -> cython.int:
        """Read once, and keep for sending what the guard lets pass."""
        count: cython.Py_ssize_t = kernel.recv(self.fd, buffer, TIGHT_READ if self.tight() else BUFFER_SIZE)
        outcome: cython.int = self.received(count)
        if outcome != GO_ON:
            return outcome
        try:
            self.pass_guard(kernel.taken(buffer, 0, count))
        except Exception:
            self.engine.worker.failed()
            self.doomed = True
        return GO_ON

    @cython.ccall
    def pass_guard(self, data: bytes):
        passed: bytes
        passed, refusal = self.guard.feed(data)
        if refusal is not None:
            self.doomed = True
        elif self.guard.opaque:
            self.guard = None
        if passed:
            self.unsent = passed
            self.unsent_at = 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def splice_in(self) -> cython.int:
        """Move bytes from the socket to the pipe; flush() moves them on. They never enter this process."""
        if self.pipe_source < 0 and not self.take_pipe():
            self.bulk = False
            return GO_ON
        count: cython.Py_ssize_t = kernel.splice(self.fd, self.pipe_sink, PIPE_SIZE)
        if count < 0:
            if count != -EAGAIN:
                return BROKEN
            self.readable = False
            self.give_pipe_back()
            return DRAINED
        if count == 0:
            self.ended = True
            return DRAINED
        self.in_pipe = count
        self.moved += count
        return GO_ON

    @cython.cfunc
    @cython.exceptval(check=False)
    def take_pipe(self) -> cython.bint:
        """A pipe costs two descriptors and three system calls; keep them, and lend one only while bytes are in flight."""
        if idle_pipes:
            self.pipe_source, self.pipe_sink = idle_pipes.pop()
        elif self.engine.pipes >= self.engine.most_pipes:
            return False
        else:
            ends = kernel.pipe(PIPE_SIZE if self.engine.pipes < self.engine.roomy_pipes else 0)
            self.pipe_source, self.pipe_sink = ends.source, ends.sink
            if ends.source < 0:  # out of descriptors: nothing was opened, nothing is counted
                return False
            self.engine.pipes += 1
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def give_pipe_back(self) -> cython.int:
        # Never lend a pipe with somebody's bytes in it. Small ones are for rushes: they are not kept.
        if self.in_pipe or len(idle_pipes) >= IDLE_PIPES or self.engine.pipes > self.engine.roomy_pipes:
            kernel.close(self.pipe_source)
            kernel.close(self.pipe_sink)
            self.engine.pipes -= 1
        else:
            idle_pipes.append((self.pipe_source, self.pipe_sink))
        self.pipe_source = self.pipe_sink = -1
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def ask_for_writable(self) -> cython.int:
        if not self.events & EPOLLOUT:
            self.events |= EPOLLOUT  # stays on: an edge-triggered EPOLLOUT costs nothing until the socket was full
            kernel.rewatch(self.engine.epoll, self.fd, self.events)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def finish(self) -> cython.int:
        """Pass the end of this stream on. When both have ended, so has the connection."""
        self.finished = True
        if self.peer.finished:
            return self.close(False, END)
        if kernel.end_stream(self.peer.fd) < 0:
            return self.peer.broken()
        return 0

    @cython.ccall
    @cython.exceptval(check=False)
    def broken(self) -> cython.int:
        """This side was reset, or cannot be written to any more."""
        return 0  # both subclasses have their own

    @cython.ccall
    @cython.exceptval(check=False)
    def close(self, reset: cython.bint, why: cython.int) -> cython.int:
        """Give up both sides."""
        return 0  # both subclasses have their own

    @cython.cfunc
    @cython.exceptval(check=False)
    def close_side(self, reset: cython.bint) -> cython.int:
        if self.closed:
            return 0
        self.closed = True
        self.peer = None  # no reference cycle: freed now, not by the garbage collector
        self.guard = None
        if reset:
            kernel.reset_on_close(self.fd)
        self.engine.close_later(self)
        if self.pipe_source >= 0:
            self.give_pipe_back()
        if self.held:
            self.engine.held -= self.held
            self.share.held -= self.held
            self.held = 0
        return 0


@cython.cclass
class Upstream(Side):
    connected: cython.bint
    greeted: cython.bint  # the upstream proxy opened the way

    @cython.ccall
    @cython.exceptval(check=False)
    def on_event(self, events: cython.uint) -> cython.int:
        if self.relaying:
            return self.relay(events)
        client: Client = self.peer
        if not self.connected:
            if events & (EPOLLERR | EPOLLHUP):
                return self.close(True, UPSTREAM_UNREACHABLE)
            self.connected = True
            client.connected_at = self.engine.now
        elif events & EPOLLERR:
            return self.close(True, UPSTREAM_RESET)
        self.note(events)
        return client.on_upstream()

    @cython.ccall
    def pass_guard(self, data: bytes):
        """The server's answer may release bytes that the client's guard held."""
        guard = self.guard
        Side.pass_guard(self, data)
        released: bytes = guard.released
        peer: Side = self.peer
        if released:
            peer.unsent = released if peer.unsent is None else peer.unsent[peer.unsent_at :] + released
            peer.unsent_at = 0
            peer.blocked = True  # sent when this side is reported writable, which is asked for anew here
            kernel.rewatch(self.engine.epoll, self.fd, self.events)

    @cython.ccall
    @cython.exceptval(check=False)
    def broken(self) -> cython.int:
        return self.close(True, UPSTREAM_RESET)

    @cython.ccall
    @cython.exceptval(check=False)
    def close(self, reset: cython.bint, why: cython.int) -> cython.int:
        return cython.cast(Client, self.peer).close(reset, why)


@cython.cclass
class Client(Side):
    """The accepted side, and the connection as a whole. Until the upstream is there it holds the first bytes as unsent."""

    source: kernel.address
    session: object
    state: cython.int
    racing: cython.bint  # GREETING goes on to RACING
    opened_at: int64_t
    connected_at: int64_t  # 0: never
    due: int64_t
    queue: Queue  # the one it is in, or None
    before: Client
    behind: Client

    @cython.ccall
    @cython.exceptval(check=False)
    def on_event(self, events: cython.uint) -> cython.int:
        if self.relaying:
            return self.relay(events)
        if events & (EPOLLERR | EPOLLHUP):
            return self.close(True, REFUSED if self.state >= LINGERING else CLIENT_RESET)
        self.note(events)
        if self.state == LINGERING:
            return self.discard()
        if self.state == WAITING or self.state == RACING:
            return self.on_first_bytes()
        return 0  # DIALING, GREETING: read when the upstream is there; HOLDING: never

    @cython.cfunc
    @cython.exceptval(check=False)
    def start(self, engine: Engine, fd: cython.int) -> cython.int:
        """Often the first bytes are there already: then there is no need to wait for an event."""
        self.engine = engine
        self.fd = fd
        self.state = WAITING
        self.opened_at = self.active_at = engine.now
        self.connected_at = self.due = 0
        self.racing = False
        self.queue = None
        self.before = self.behind = None
        engine.live += 1
        destination = kernel.local_name(fd)  # TPROXY: the original destination
        try:
            self.session = engine.worker.session(
                kernel.packed(self.source), kernel.packed(destination), kernel.port(destination)
            )
            self.share = self.session.share
        except Exception:
            return self.close(True, INTERNAL)
        self.share.pending += 1
        self.on_first_bytes()
        if not self.closed:
            self.watch(READABLE)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def on_first_bytes(self) -> cython.int:
        """Read what may decide. The session hears the bytes so far, or once that there are none yet."""
        if self.unsent is not None and len(self.unsent) >= ENOUGH:  # its pod is not known: the rest waits in the socket
            self.readable = True
            return 0
        count: cython.Py_ssize_t = kernel.recv(self.fd, buffer, FIRST_READ)
        data: bytes
        if count == -EAGAIN:
            if self.queue is None:
                return self.act(self.ask(0))
            return 0
        if count < 0:
            return self.close(True, CLIENT_RESET)
        if count == 0:
            self.ended = True
            return self.act(self.ask(1))
        if not self.moved:
            self.first_at = self.engine.now
        self.moved += count
        # The end of the stream may be next, and makes no edge any more
        self.readable = count == FIRST_READ or self.hung_up
        data = kernel.taken(buffer, 0, count)
        self.unsent = data if self.unsent is None else self.unsent + data
        self.act(self.ask(2))
        if not self.closed and not self.relaying and self.unsent is not None:
            self.account()
        if (self.readable or self.read_on) and not self.closed and (self.state == WAITING or self.state == RACING):
            return self.on_first_bytes()  # what is left in the socket, or its end, makes no edge any more
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def ask(self, what: cython.int) -> cython.int:
        """The session's next step after: 0 nothing came yet, 1 the client ended, 2 bytes, 3 silence, 4 the server spoke, 5 too late,
        6 its pod did not come to be known."""
        step: cython.int = REFUSE
        try:
            if what == 2:
                step = self.session.received(self.unsent)
                if self.session.guard is not None and step == DIAL:
                    self.guard = self.session
                    self.unsent = self.session.held
            elif what == 0:
                step = self.session.opened()
            elif what == 3:
                step = self.session.silent()
            elif what == 4:
                step = self.session.server_spoke()
            elif what == 6:
                step = self.session.expired()
            else:
                step = self.session.gave_up()
        except Exception:  # a decision that fails is a refusal
            self.engine.worker.failed()
        return step

    @cython.cfunc
    @cython.exceptval(check=False)
    def tell_again(self) -> cython.int:
        """The session waited for its pod, and hears now what came meanwhile."""
        self.leave_queue()
        if self.unsent is not None:
            self.act(self.ask(2))
            if self.ended and not self.closed and self.state == WAITING:
                self.act(self.ask(1))
            return 0
        return self.act(self.ask(1 if self.ended else 0))

    @cython.cfunc
    @cython.exceptval(check=False)
    def act(self, step: cython.int) -> cython.int:
        if step == DIAL:
            if self.peer is None:
                return self.dial(DIALING)
            return self.won()
        if step == WAIT:
            if self.session.unknown:
                if self.queue is None:
                    self.join_queue(self.engine.unknown)
                return 0
            if self.unsent is not None or self.queue is self.engine.silent:
                if self.queue is not self.engine.waiting:
                    self.join_queue(self.engine.waiting)
            elif self.queue is None:
                self.join_queue(self.engine.silent)
            return 0
        if step == RACE:
            return self.dial(RACING)
        self.drop_upstream()
        if step == HOLD:
            self.state = HOLDING
            return self.join_queue(self.engine.holding)
        return self.refuse()

    @cython.cfunc
    @cython.exceptval(check=False)
    def dial(self, state: cython.int) -> cython.int:
        """Connect to where the session says, from the pod's address or the node's."""
        fd: cython.int
        spoof: cython.bint
        try:
            ip, port = self.session.target or (self.session.destination, self.session.port)
            destination = kernel.made(ip, port)
            spoof = self.session.spoof
        except Exception:
            return self.close(True, INTERNAL)
        fd = kernel.dial(self.source, spoof, destination, self.engine.mark, self.unsent is not None)
        if fd < 0:
            return self.close(True, UPSTREAM_UNREACHABLE)
        upstream: Upstream = Upstream()
        upstream.engine = self.engine
        upstream.share = self.share
        upstream.connected = upstream.greeted = False
        upstream.fd = fd
        upstream.peer = self
        self.peer = upstream
        self.state = state
        self.join_queue(self.engine.connecting)
        return upstream.watch(READABLE | EPOLLOUT)

    @cython.cfunc
    @cython.exceptval(check=False)
    def won(self) -> cython.int:
        """The verdict came while the upstream was dialled in a race."""
        upstream: Upstream = self.peer
        if self.session.redial:
            self.drop_upstream()
            return self.dial(DIALING)
        self.state = DIALING
        if upstream.connected:
            return self.on_upstream()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def on_upstream(self) -> cython.int:
        """The upstream is connected, and perhaps said something."""
        upstream: Upstream = self.peer
        if self.session.handshake is not None and not upstream.greeted:
            if self.state == GREETING:
                return self.on_greeting()
            self.racing = self.state == RACING
            self.state = GREETING
            return self.greet(self.session.handshake.greeting())
        if self.state == DIALING:
            return self.begin()
        if upstream.readable or upstream.unsent is not None:
            return self.act(self.ask(4))
        self.join_queue(self.engine.idle)
        return self.on_first_bytes() if self.readable else 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def greet(self, data: bytes) -> cython.int:
        """The few bytes of a handshake always fit into an empty socket."""
        if data and kernel.send_rest(self.peer.fd, data, 0, 0) != len(data):
            return self.close(True, UPSTREAM_PROXY)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def on_greeting(self) -> cython.int:
        upstream: Upstream = self.peer
        count: cython.Py_ssize_t
        if not upstream.readable:
            return 0
        count = kernel.recv(upstream.fd, buffer, FIRST_READ)
        if count == -EAGAIN:
            return 0
        if count <= 0:
            return self.close(True, UPSTREAM_PROXY)
        try:
            answer, rest = self.session.handshake.feed(kernel.taken(buffer, 0, count))
        except Exception:
            return self.close(True, UPSTREAM_PROXY)
        self.greet(answer)
        if rest is None or self.closed:
            return 0
        upstream.greeted = True
        upstream.readable = count == FIRST_READ or upstream.hung_up
        if rest:  # the server behind the proxy spoke already
            upstream.unsent = rest
            upstream.unsent_at = 0
        self.state = RACING if self.racing else DIALING
        return self.on_upstream()

    @cython.cfunc
    @cython.exceptval(check=False)
    def begin(self) -> cython.int:
        """Both sides are open and the verdict stands: relay."""
        upstream: Upstream = self.peer
        self.state = RELAYING
        self.share.pending -= 1
        self.relaying = upstream.relaying = True
        self.active_at = self.engine.now
        self.join_queue(self.engine.idle)
        if self.guard is not None:
            upstream.guard = self.session.responses()  # never raises
        self.pump()  # the first bytes wait there
        if not self.closed and (upstream.readable or upstream.unsent is not None):
            upstream.pump()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def refuse(self) -> cython.int:
        reply: bytes = None
        try:
            reply = self.session.reply()
        except Exception:
            self.engine.worker.failed()
        if reply is None or kernel.send_rest(self.fd, reply, 0, 0) < 0 or kernel.end_stream(self.fd) < 0:
            return self.close(True, REFUSED)
        # Closed at once, bytes of the client still under way would reset it before the reply is read
        self.state = LINGERING
        self.join_queue(self.engine.lingering)
        return self.discard()

    @cython.cfunc
    @cython.exceptval(check=False)
    def discard(self) -> cython.int:
        count: cython.Py_ssize_t = BUFFER_SIZE
        i: cython.int
        for i in range(STEPS_PER_TURN):
            count = kernel.recv(self.fd, buffer, BUFFER_SIZE)
            if count <= 0:
                break
        if count == -EAGAIN:
            return 0
        return self.close(count != 0, REFUSED)

    @cython.cfunc
    @cython.exceptval(check=False)
    def join_queue(self, queue: Queue) -> cython.int:
        self.leave_queue()
        self.queue = queue
        self.due = self.engine.now + queue.after
        self.before = queue.last
        if queue.last is None:
            queue.first = self
        else:
            queue.last.behind = self
        queue.last = self
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def leave_queue(self) -> cython.int:
        queue: Queue = self.queue
        if queue is None:
            return 0
        if self.before is None:
            queue.first = self.behind
        else:
            self.before.behind = self.behind
        if self.behind is None:
            queue.last = self.before
        else:
            self.behind.before = self.before
        self.before = self.behind = None
        self.queue = None
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def on_timeout(self, queue: Queue) -> cython.int:
        engine: Engine = self.engine
        if queue is engine.idle:
            last: int64_t = self.active_at
            if self.peer is not None and self.peer.active_at > last:
                last = self.peer.active_at
            if engine.now - last < engine.idle_ns:
                return self.join_queue(engine.idle)
            return self.close(True, IDLE_TIMEOUT)
        if queue is engine.connecting:
            return self.close(True, CONNECT_TIMEOUT)
        if queue is engine.unknown:
            outcome: cython.int = self.ask(6)
            return self.tell_again() if outcome == WAIT else self.act(outcome)
        if queue is engine.silent:
            step: cython.int = self.ask(3)
            if step == WAIT:
                return self.join_queue(engine.waiting)
            return self.act(step)
        if queue is engine.waiting:
            return self.act(self.ask(5))
        return self.close(True, REFUSED)  # lingering, holding

    @cython.cfunc
    @cython.exceptval(check=False)
    def review(self) -> cython.int:
        """The policy has changed: both sides are reset if this connection may not go on."""
        why: cython.int = POLICY_CHANGED
        if self.state >= LINGERING:
            return 0
        try:
            why = self.session.review()
        except Exception:  # a decision that fails is a refusal
            self.engine.worker.failed()
        if why:
            return self.close(True, why)
        if self.queue is self.engine.unknown and self.known():
            return self.tell_again()
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def known(self) -> cython.bint:
        """Whether the session need not wait any more; then it has been told."""
        try:
            if not self.session.known():
                return False
            self.session.found()
        except Exception:
            self.engine.worker.failed()
            return False
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def drop_upstream(self) -> cython.int:
        if self.peer is not None:
            self.peer.close_side(True)
            self.peer = None
        return 0

    @cython.ccall
    @cython.exceptval(check=False)
    def broken(self) -> cython.int:
        return self.close(True, CLIENT_RESET)

    @cython.ccall
    @cython.exceptval(check=False)
    def close(self, reset: cython.bint, why: cython.int) -> cython.int:
        """End the connection: both sides, its place in a queue, and its record."""
        if self.closed:
            return 0
        upstream: Side = self.peer
        self.leave_queue()
        self.close_side(reset)
        self.engine.live -= 1
        if self.engine.paused and self.engine.live + ROOM <= self.engine.most:
            self.engine.resume_at = self.engine.now
        if self.share is not None and not self.relaying:
            self.share.pending -= 1
        up: int64_t = 0
        down: int64_t = 0
        answered_at: int64_t = 0
        if upstream is not None:
            up = self.moved if self.relaying else 0  # what was only read to decide by it went nowhere
            down = upstream.moved
            answered_at = upstream.first_at
            upstream.close_side(reset)
        try:
            if self.session is not None:
                self.engine.worker.closed(
                    self.session,
                    kernel.port(self.source),
                    why,
                    self.opened_at,
                    self.connected_at,
                    answered_at,
                    self.engine.now,
                    up,
                    down,
                )
        except Exception:
            self.engine.worker.failed()
        self.session = None
        return 0
