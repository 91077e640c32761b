"""A connection to an address that nobody has: who gets an answer there knows that this node's pods are intercepted. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.share import Share
from .session import GOES_ON, REFUSE, Session

if TYPE_CHECKING:
    from .judge import Judge

PORT = 80


class Canary(Session):
    """Answers with the revision in force, whatever policies say, and leaves no record."""

    def __init__(self, judge: Judge, source: bytes, destination: bytes, share: Share, node: str) -> None:
        super().__init__(judge, source, destination, PORT, share)
        self._node = node

    def opened(self) -> int:
        return REFUSE

    def received(self, data: bytes) -> int:
        return REFUSE

    def gave_up(self) -> int:
        return REFUSE

    def reply(self) -> bytes | None:
        if self.too_many:
            return None
        body = f"{self.judge.enforced.revision} {self._node}\n".encode()
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body

    def review(self) -> int:
        return GOES_ON
