"""What the kernel does with a seccomp program, as far as ours go: a reference for tests (Documentation/networking/filter.rst)."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def run(program: bytes, number: int, audit: int, arguments: Sequence[int] = ()) -> int:
    """What the program returns for one call. Raises AssertionError for what the kernel's checker would refuse."""
    assert len(program) % 8 == 0
    code = list(struct.iter_unpack("=HBBI", program))
    data = struct.pack("=IIQ6Q", number, audit, 0, *(each & (1 << 64) - 1 for each in (*arguments, *[0] * 6)[:6]))
    accumulator, at = 0, 0
    while True:
        assert at < len(code), "runs off its end"
        operation, if_true, if_false, operand = code[at]
        at += 1
        match operation:
            case 0x20:
                assert operand % 4 == 0 and operand < len(data)
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x35:
                at += if_true if accumulator >= operand else if_false
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(f"unknown instruction {operation:#x}")
