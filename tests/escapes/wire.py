"""The steps of a technique as bytes: ClientHellos, and IP packets down to their checksums. Pure."""

from __future__ import annotations

import ipaddress
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise

from tests.proxy.sniff.hellos import PADDING, extension, handshake, records, server_name

from .corpus import Hello, Packet, raw

TOKEN = b"ESCA"
"""In every packet that a technique sends: in its data, or as the sequence number of a TCP segment without any."""

_FLAGS = "FSRPAUEC"
_TCP, _UDP, _ICMP, _ICMPV6, _FRAGMENT = 6, 17, 1, 58, 44


def hello(spec: Hello) -> bytes:
    """The records of a ClientHello."""
    extensions = [server_name(*map(raw, names), kind=spec.kind) for names in (spec.names, spec.again) if names]
    extensions += [extension(kind, raw(content)) for kind, content in spec.extensions.items()]
    if spec.pad:
        extensions.append(extension(PADDING, bytes(spec.pad)))
    sent = records(handshake(*extensions), spec.sizes)
    sent = sent.replace(b"\x16\x03\x01", b"\x16" + raw(spec.version))
    return sent[: len(sent) - spec.cut]


def datagrams(packet: Packet, source: str, to: str, nth: int = 0) -> Iterator[bytes]:
    """The IP packets, or their fragments, in the order in which they are sent. source, to: addresses; nth: of packet.times."""
    own, other = (ipaddress.ip_address(address).packed for address in (source, to))
    protocol, payload = _transport(packet, own, other, nth)
    for kind, content in reversed(packet.headers):
        payload = bytes([protocol, (len(content) - 6) // 8 if kind != _FRAGMENT else 0]) + raw(content) + payload
        protocol = kind
    if not packet.fragments:
        yield _ip(packet, own, other, protocol, payload, 0, 0)
        return
    cuts = [0, *packet.fragments, len(payload)]
    identification = zlib.crc32(repr(packet).encode())  # no two are put together
    pieces = [
        _ip(packet, own, other, protocol, payload[start:end], start | (end < len(payload)), identification)
        for start, end in pairwise(cuts)
    ]
    for number in packet.order or range(len(pieces)):
        yield pieces[number]


def _transport(packet: Packet, own: bytes, other: bytes, nth: int) -> tuple[int, bytes]:
    """Protocol number and payload."""
    if packet.tcp is not None:
        tcp = packet.tcp
        flags = sum(1 << _FLAGS.index(letter) for letter in tcp.flags)
        options = raw(tcp.options)
        offset = (20 + len(options)) // 4 << 4
        acknowledged = 1 if "A" in tcp.flags else 0
        head = struct.pack(
            "!HH4sIBBHHH", tcp.source + nth, tcp.to, TOKEN, acknowledged, offset, flags, 65535, 0, 1 if "U" in tcp.flags else 0
        )  # fmt: skip
        data = head + options + raw(tcp.data)
        return _TCP, _checked(data, 16, own, other, _TCP)
    if packet.udp is not None:
        data = struct.pack("!HHHH", 4660 + nth, packet.udp.to, 8 + len(packet.udp.data), 0) + raw(packet.udp.data)
        return _UDP, _checked(data, 6, own, other, _UDP)
    if packet.icmp is not None:
        data = struct.pack("!BBH", packet.icmp.type, packet.icmp.code, 0) + raw(packet.icmp.data)
        if packet.version == 6:
            return _ICMPV6, _checked(data, 2, own, other, _ICMPV6)
        return _ICMP, data[:2] + struct.pack("!H", _checksum(data)) + data[4:]
    assert packet.payload is not None
    assert packet.protocol is not None
    return packet.protocol, raw(packet.payload)


def _checked(data: bytes, at: int, own: bytes, other: bytes, protocol: int) -> bytes:
    """data with the checksum over it and its pseudo header."""
    pseudo = own + other + struct.pack("!II", len(data), protocol)
    return data[:at] + struct.pack("!H", _checksum(pseudo + data)) + data[at + 2 :]


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _ip(
    packet: Packet, own: bytes, other: bytes, protocol: int, payload: bytes, place: int, identification: int
) -> bytes:
    """One IP packet, or a fragment: place is where it begins, a multiple of 8, and 1 more if it is not the last."""
    if packet.version == 6:
        if packet.fragments:
            payload = struct.pack("!BBHI", protocol, 0, place, identification) + payload
            protocol = _FRAGMENT
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + own + other + payload
    options = raw(packet.options)
    words = 5 + len(options) // 4
    fragment = place >> 3 | (place & 1) << 13
    head = struct.pack(
        "!BBHHHBBH", 4 << 4 | words, 0, words * 4 + len(payload), identification & 0xFFFF, fragment, 64, protocol, 0
    )
    head += own + other + options
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + payload
