"""Flow records as people read them, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

_COLOURS = {"Allow": "green", "Block": "red", "Route": "cyan", "Intercept": "magenta"}


class Tail:
    """Follows a file of lines that another process appends to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def lines(self) -> list[bytes]:
        """What came since the last call, whole lines only and without their ends."""
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        return whole

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def flow_text(line: bytes) -> str:
    """A flow record for a terminal: time, verdict, who, to whom, by which rule, how much, and how it ended if not in order.

    Raises ValueError if line is no flow record."""
    try:
        return _text(json.loads(line))
    except (KeyError, TypeError) as err:
        raise ValueError(f"no flow record: {line[:200]!r}") from err


def wide_text(line: bytes) -> str:
    """As flow_text, with protocol, source port, times, how it ended and whose doing that was, and the revision. Raises ValueError."""
    text = flow_text(line)
    flow = json.loads(line)
    try:
        first = "–" if flow["firstByteSeconds"] is None else f"{flow['firstByteSeconds'] * 1000:.0f} ms"
        source, ended = flow["source"], flow["ended"]
        more = (
            f"{flow['protocol']}  {flow['reason']}  from {source['address']} port {source['port']}  first byte {first}  "
            f"{flow['durationSeconds']:.3f} s  {ended['by']}: {ended['why']}  {flow['node']} {flow['revision']}"
        )
    except (KeyError, TypeError) as err:
        raise ValueError(f"no flow record: {line[:200]!r}") from err
    return f"{text}  {click.style(more, dim=True)}"


def _text(flow: Mapping[str, Any]) -> str:
    source, destination, size = flow["source"], flow["destination"], flow["bytes"]
    pod = f"{source['namespace']}/{source['pod']}" if source["pod"] else source["address"]
    address = destination["address"]
    where = f"[{address}]:{destination['port']}" if ":" in address else f"{address}:{destination['port']}"
    name = f"{destination['name']} ({where})" if destination["name"] else where
    verdict = click.style(f"{flow['verdict']:<6}", fg=_COLOURS.get(flow["verdict"]), bold=True)
    by, why = flow["ended"]["by"], flow["ended"]["why"]
    ended = "" if by == "peers" else f"  {why}" if why == "Refused" else f"  {why} (by the {by})"
    # Time of day is enough: these are records of now.
    return (
        f"{flow['time'][11:23]}  {verdict}  {pod} → {name}  {_by(flow)}  "
        f"{_size(size['up'])} up, {_size(size['down'])} down{click.style(ended, dim=True)}"
    )


def _by(flow: Mapping[str, Any]) -> str:
    said = _rule(flow["policy"]) if flow["policy"] else flow["reason"]
    audit = flow.get("audit")
    if audit and audit["policy"]:
        said += click.style(f", on trial {audit['verdict']} by {_rule(audit['policy'])}", fg="yellow")
    return said


def _rule(policy: Mapping[str, str]) -> str:
    return f"{policy['name']}/{policy['rule']}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
