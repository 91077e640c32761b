"""What waits for peers that do not read: counted to the byte, and little more is read once it is much."""

from __future__ import annotations

import random
import resource
import socket

from pellucid_proxy.engine import relay
from pellucid_proxy.engine.share import Share

from .harness import WAIT, Bench, Script, bench, reset

MIB = 1 << 20
MOST = 2 * MIB
SENT = (
    96 * MIB
)  # more than both sockets of a stalled connection hold, where the kernel lets them grow (tcp_rmem, tcp_wmem)
PIPE_COST = 65536  # what a lent pipe counts as at least
PIECE = 4096  # what is read where too much waits already


def _stalled(b: Bench) -> tuple[socket.socket, socket.socket]:
    """A connection whose client does not read what its origin sends."""
    client = b.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # else the kernel makes room for more and more
    client.send(b"!")
    origin = b.accept()
    assert b.read(origin, 1) == b"!"
    return client, origin


def _pushed(b: Bench, origin: socket.socket, data: bytes) -> int:
    """How much of data the origin could send until nothing moved any more."""
    sent = quiet = 0
    while quiet < 5:
        try:
            sent += origin.send(data[sent : sent + MIB])
            b.engine.poll(0)
            quiet = 0
        except BlockingIOError:
            quiet = 0 if b.engine.poll(20) else quiet + 1
        assert sent < len(data), "it reads"
    return sent


def test_beyond_its_share_a_pod_holds_little_more_and_loses_no_byte() -> None:
    share = Share()
    data = random.Random(1).randbytes(SENT)
    with bench(lambda: Script(share=share), max_held_bytes_per_pod=MOST) as b:
        pairs = [_stalled(b) for _ in range(2)]
        sent = [_pushed(b, origin, data) for _, origin in pairs]
        assert 0 < share.held == b.engine.held_bytes <= MOST + relay.pipe_bytes + len(pairs) * PIECE
        for (client, origin), count in zip(pairs, sent, strict=True):
            origin.shutdown(socket.SHUT_WR)
            assert b.read(client, count) == data[:count]
            assert b.ends(client) == "end"
            client.close()
        b.until(lambda: not b.engine.connections)
        assert (share.held, b.engine.held_bytes, share.pending) == (0, 0, 0)


def test_only_the_pod_that_holds_its_share_is_read_in_small_pieces() -> None:
    shares = [Share(), Share()]
    shares[0].held = MOST  # by other connections
    scripts = iter([Script(share=shares[0]), Script(share=shares[1])])
    with bench(scripts.__next__, max_held_bytes_per_pod=MOST) as b:
        for _ in shares:
            _, origin = _stalled(b)
            _pushed(b, origin, bytes(SENT))
        assert shares[0].held - MOST <= PIECE
        assert shares[1].held >= PIPE_COST, "it has what waits in a pipe"


def test_a_worker_that_holds_much_reads_little_of_every_pod() -> None:
    share = Share()
    with bench(lambda: Script(share=share), max_held_bytes=0) as b:
        _, origin = _stalled(b)
        _pushed(b, origin, bytes(SENT))
        assert 0 < share.held <= PIECE


def test_first_bytes_count_until_they_are_sent_or_given_up() -> None:
    share = Share()
    with bench(lambda: Script(share=share, on_received=WAIT)) as b:
        client = b.connect()
        client.send(b"x" * 100)
        b.until(lambda: share.held == 100)
        assert share.pending == 1
        reset(client)
        b.until(lambda: b.ended)
        assert (share.held, share.pending, b.engine.held_bytes) == (0, 0, 0)


def test_without_a_pipe_bytes_are_copied() -> None:
    data = random.Random(2).randbytes(4 * MIB)
    with bench(most_pipes=0) as b:
        client, origin = _stalled(b)
        sent = 0
        got = bytearray()
        while len(got) < len(data):
            if sent < len(data):
                try:
                    sent += origin.send(data[sent : sent + MIB])
                except BlockingIOError:
                    pass
            b.engine.poll(1)
            try:
                got += client.recv(MIB)
            except BlockingIOError:
                pass
        assert bytes(got) == data


def test_without_a_descriptor_new_connections_wait_and_live_ones_go_on() -> None:
    with bench() as b:
        client, origin = _stalled(b)
        late = b.connect()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno(), hard))
        try:
            b.until(lambda: b.engine.times_paused)
            client.send(b"more")
            assert b.read(origin, 4) == b"more"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late.send(b"late")
        assert b.read(b.accept(), 4) == b"late"
