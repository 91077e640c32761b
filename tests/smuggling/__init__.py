"""Requests that servers cut apart differently, a file each, in techniques; this module reads them, strictly.

Each follows a valid request on a connection. Of it passes nothing, or what passes says, then the refusal.
tests/proxy/session/test_http_guard.py holds the guard to them, test_smuggling.py compares with other servers.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import yaml

from pellucid_proxy.session.http_guard import Refusal

HERE = Path(__file__).resolve().parent


class Smuggled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """request, passes: a character is a byte. source: where the technique is from, or the clause that it breaks."""

    title: str
    source: str
    request: str
    refusal: Refusal
    passes: str = ""

    @property
    def sent(self) -> bytes:
        """The bytes of the request."""
        return self.request.encode("latin-1")

    @property
    def passed(self) -> bytes:
        """The bytes of it that may go to a server."""
        return self.passes.encode("latin-1")


def techniques() -> dict[str, Smuggled]:
    """All of them by name. Raises ValueError for a file that is none."""
    return {
        path.stem: msgspec.convert(yaml.safe_load(path.read_text()), Smuggled)
        for path in sorted((HERE / "techniques").glob("*.yaml"))
    }
