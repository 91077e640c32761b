"""The last good policy on this node's disk: what is enforced when the folder is bad or away at the start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile

import msgspec

from ..supervisor.options import LAST_GOOD as NAME
from .policy import Accepted

FORMAT = 1


class _Envelope(msgspec.Struct, frozen=True):
    format: int
    sha256: bytes  # of content
    content: bytes  # Accepted as msgpack


class Unusable(Exception):
    """There is no last good policy, or it cannot be trusted; says why."""


def save(state: str, accepted: Accepted) -> None:
    """Replace the last good policy in folder state; after a power cut either the old or the new one is there. Raises OSError."""
    content = msgspec.msgpack.encode(
        Accepted(accepted.policy, accepted.wishes, accepted.snapshot)
    )  # without what it was made from
    data = msgspec.msgpack.encode(_Envelope(FORMAT, hashlib.sha256(content).digest(), content))
    fd, temporary = tempfile.mkstemp(prefix=f".{NAME}-", dir=state)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(state, NAME))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the rename too
    finally:
        os.close(folder)


def load(state: str) -> Accepted:
    """The last good policy of folder state. Raises Unusable."""
    path = os.path.join(state, NAME)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as err:
        raise Unusable(f"{path}: there is none yet") from err
    except OSError as err:
        raise Unusable(f"{path}: {err.strerror}") from err
    try:
        envelope = msgspec.msgpack.decode(data, type=_Envelope)
        if envelope.format != FORMAT:
            raise Unusable(f"{path}: has format {envelope.format}, this version reads {FORMAT}")
        if hashlib.sha256(envelope.content).digest() != envelope.sha256:
            raise Unusable(f"{path}: is damaged, its hash does not fit")
        return msgspec.msgpack.decode(envelope.content, type=Accepted)
    except msgspec.MsgspecError as err:
        raise Unusable(f"{path}: is damaged or of another version: {err}") from err
