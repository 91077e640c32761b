"""faulty_relay.py FAULT: a relay from 127.0.0.2 to 127.0.0.1 for the ports of verify, right but for one fault.

Faults: none, resets-as-ends, no-half-close, flipped-byte, dropped-byte."""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading

STREAMS, REPORT = 5005, 5006
FLAWED_AT = 1000  # bytes from the server
LINGER_0 = struct.pack("ii", 1, 0)  # close() then resets


class Relay:
    """One connection. `pending` are the bytes still to be sent to a socket."""

    def __init__(self, client: socket.socket, server: socket.socket, fault: str) -> None:
        self.client, self.server, self.fault = client, server, fault
        self.other = {client: server, server: client}
        self.pending = {client: b"", server: b""}
        self.ended: set[socket.socket] = set()
        self.closed: set[socket.socket] = set()
        self.downloaded = 0

    def run(self) -> None:
        sockets = {each.fileno(): each for each in self.other}
        poll = select.poll()
        try:
            while len(self.closed) < 2:
                for each in self.other:
                    poll.register(each, self.interest(each))
                for fd, events in poll.poll():
                    self.serve(sockets[fd], events)
        except (ConnectionResetError, BrokenPipeError):
            if self.fault != "resets-as-ends":
                for each in self.other:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        for each in self.other:
            each.close()

    def interest(self, each: socket.socket) -> int:
        may_read = each not in self.ended and not self.pending[self.other[each]]
        return (select.POLLIN if may_read else 0) | (select.POLLOUT if self.pending[each] else 0)

    def serve(self, each: socket.socket, events: int) -> None:
        if events & select.POLLERR and not events & select.POLLIN:
            raise ConnectionResetError
        if events & select.POLLIN:
            data = each.recv(65536)
            if not data:
                self.ended.add(each)
            self.pending[self.other[each]] = self.flawed(data) if each is self.server else data
        for target in self.other:
            self.flush(target)

    def flush(self, target: socket.socket) -> None:
        if self.pending[target]:
            try:
                self.pending[target] = self.pending[target][target.send(self.pending[target]) :]
            except BlockingIOError:
                return
        over = self.other[target] in self.ended and not self.pending[target]
        if over and target not in self.closed:
            target.shutdown(socket.SHUT_WR)
            self.closed.add(target)
            if self.fault == "no-half-close":
                self.closed.update(self.other)

    def flawed(self, data: bytes) -> bytes:
        at = FLAWED_AT - self.downloaded
        self.downloaded += len(data)
        if self.fault.endswith("-byte") and 0 <= at < len(data):
            return data[:at] + (bytes([data[at] ^ 1]) if self.fault == "flipped-byte" else b"") + data[at + 1 :]
        return data


def serve(listener: socket.socket, port: int, fault: str) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for each in (client, server):
            each.setblocking(False)
        threading.Thread(target=Relay(client, server, fault).run, daemon=True).start()


def main(fault: str) -> None:
    listeners = {port: socket.create_server(("127.0.0.2", port), backlog=64) for port in (STREAMS, REPORT)}
    threading.Thread(target=serve, args=(listeners[REPORT], REPORT, "none"), daemon=True).start()
    serve(listeners[STREAMS], STREAMS, fault)


if __name__ == "__main__":
    main(sys.argv[1])
