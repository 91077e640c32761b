"""A client that opens HTTP connections as fast as they go until its standard input ends; then it prints how they ended and how many
seconds the slowest one took that was answered, as JSON.

usage: load.py PORT NAME PARALLEL ADDRESS...
"""

from __future__ import annotations

import errno
import itertools
import json
import socket
import sys
import threading
import time
from collections import Counter

ANSWER = b"\r\n\r\nok\n"
PATIENCE_S = 10.0


def once(address: str, port: int, request: bytes) -> str:
    """How one connection ended: ok, the status line of another answer, closed, silence, or the name of an error."""
    received = b""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect((address, port))
            connection.sendall(request)
            while more := connection.recv(4096):
                received += more
    except TimeoutError:
        return "silence"
    except OSError as err:
        return errno.errorcode.get(err.errno or 0, str(err))
    if received.endswith(ANSWER):
        return "ok"
    return received.split(b"\r\n", 1)[0].decode("latin-1") or "closed"


def main() -> None:
    port, name, parallel, *addresses = sys.argv[1:]
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode()
    stop = threading.Event()
    counts = [Counter[str]() for _ in range(int(parallel))]
    slowest = [0.0] * int(parallel)

    def work(count: Counter[str], offset: int) -> None:
        for address in itertools.islice(itertools.cycle(addresses), offset, None):
            if stop.is_set():
                return
            began = time.monotonic()
            ended = once(address, int(port), request)
            count[ended] += 1
            if ended == "ok":
                slowest[offset] = max(slowest[offset], time.monotonic() - began)

    threads = [threading.Thread(target=work, args=(count, at)) for at, count in enumerate(counts)]
    for thread in threads:
        thread.start()
    sys.stdin.buffer.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"ended": sum(counts, Counter[str]()), "slowest_s": max(slowest)}))


if __name__ == "__main__":
    main()
