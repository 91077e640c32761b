"""Inputs out of other inputs: a few random edits, some of them aware of lengths and of the protocols' words."""

from __future__ import annotations

import random

MAX_INPUT = 20000
WORDS = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"\r\n\r\n", b"\r\n ", b"0\r\n\r\n", b"5\r\nhello\r\n", b"ffffffff",
    b"GET / HTTP/1.1\r\n", b"POST http://b.example/ HTTP/1.0\r\n", b"CONNECT a.example:1 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\n",
    b"Host: a.example\r\n", b"Host: evil.example\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Upgrade: websocket\r\n", b"HTTP/1.1 101 S\r\n\r\n",
    b"HTTP/1.1 100 C\r\n\r\n", b"@", b"[::1]", b"xn--", b".", b"..", b"0x7f", b"127.0.0.1", b"\xc3\xbc",
    b"\x16\x03\x01", b"\x16\x03\x01\0\1", b"\x01\0\0", b"\0\0", b"\0\x10", b"\xfe\x0d", b"\x0a\x0a", b"\xff\xff", b"\0\0\0\x08\x04\xd2",
)  # fmt: skip


def mutated(pool: list[bytes], choose: random.Random) -> bytes:
    """One to four edits of an input out of the pool."""
    data = bytearray(choose.choice(pool))
    for _ in range(choose.randint(1, 4)):
        choose.choice(EDITS)(data, pool, choose)
    return bytes(data[:MAX_INPUT])


def _flip(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    if data:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)


def _replace(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    if data:
        data[choose.randrange(len(data))] = choose.choice(
            (0, 1, 9, 10, 13, 32, 58, 127, 128, 255, choose.randrange(256))
        )


def _count(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    """Most lengths are one or two bytes, and wrong ones are off by a little."""
    if len(data) > 1:
        at = choose.randrange(len(data) - 1)
        value = int.from_bytes(data[at : at + 2], "big") + choose.choice((-4, -2, -1, 1, 2, 4, 256))
        data[at : at + 2] = (value & 0xFFFF).to_bytes(2, "big")


def _insert(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    at = choose.randrange(len(data) + 1)
    data[at:at] = choose.choice(WORDS)


def _cut(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    start, end = _range(data, choose)
    del data[start:end]


def _end(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    del data[choose.randrange(len(data) + 1) :]


def _repeat(data: bytearray, _pool: list[bytes], choose: random.Random) -> None:
    start, end = _range(data, choose)
    data[start:start] = data[start:end] * choose.choice((1, 1, 2, 50))


def _splice(data: bytearray, pool: list[bytes], choose: random.Random) -> None:
    other = choose.choice(pool)
    data[choose.randrange(len(data) + 1) :] = other[choose.randrange(len(other) + 1) :]


def _append(data: bytearray, pool: list[bytes], choose: random.Random) -> None:
    data += choose.choice(pool)


def _range(data: bytearray, choose: random.Random) -> tuple[int, int]:
    start = choose.randrange(len(data) + 1)
    return start, min(len(data), start + choose.choice((1, 2, 4, 16, 64)))


EDITS = (_flip, _replace, _count, _insert, _cut, _end, _repeat, _splice, _append)
