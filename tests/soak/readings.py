"""What a run holds when nothing goes on: memory and descriptors of its processes, kernel rules, conntrack entries, sockets."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.netns.product.stage import TABLE, Stage

PASSING = ("TIME-WAIT", "LISTEN")
"""States of sockets that hold no connection."""


class Memory(NamedTuple):
    """KiB, as /proc/PID/smaps_rollup has them."""

    rss: int
    pss: int


@dataclass(frozen=True)
class Reading:
    """memory and descriptors by process; descriptors: how many of each kind. rules: the kernel's table without its counts."""

    memory: Mapping[str, Memory]
    descriptors: Mapping[str, Counter[str]]
    rules: str
    elements: int
    tracked: Sequence[str]
    sockets: int


def read(stage: Stage, processes: Mapping[str, int]) -> Reading:
    """As it is now. Raises OSError if one of processes, given by name and id, has ended."""
    rules = _rules(stage)
    return Reading(
        memory={name: _memory(pid) for name, pid in processes.items()},
        descriptors={name: _descriptors(pid) for name, pid in processes.items()},
        rules=json.dumps(rules, sort_keys=True),
        elements=sum(len(entry["set"].get("elem", ())) for entry in rules if "set" in entry)
        + sum(len(entry["map"].get("elem", ())) for entry in rules if "map" in entry),
        tracked=tracked(stage),
        sockets=sockets(stage),
    )


def tracked(stage: Stage) -> list[str]:
    """Entries of the node's connection tracking but those of the node with itself: readers of metrics leave some."""
    # Not nf_conntrack_count: an entry that has expired counts there until the kernel comes by, a minute later at most
    lines = stage.node.run(["conntrack", "-L"], check=False).stdout.splitlines()
    return [line for line in lines if "src=127.0.0.1 dst=127.0.0.1 " not in line]


def sockets(stage: Stage) -> int:
    """TCP sockets of the node that hold a connection, in whatever state of it but TIME-WAIT."""
    lines = stage.node.run(["ss", "-Htan"]).stdout.splitlines()
    return sum(line.split()[0] not in PASSING for line in lines)


def _memory(pid: int) -> Memory:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    return Memory(int(fields["Rss"]), int(fields["Pss"]))


def _descriptors(pid: int) -> Counter[str]:
    """By what they lead to: socket, pipe, anon_inode:[eventpoll], or a file by its name."""
    folder = f"/proc/{pid}/fd"
    return Counter(re.sub(r":\[\d+\]$", "", os.readlink(f"{folder}/{each}")) for each in os.listdir(folder))


def _rules(stage: Stage) -> list[dict[str, Any]]:
    """Our table: chains, rules, sets and their elements; without handles, which are new with each change, and without counts.

    Sorted, but for the rules of a chain: the order of nothing else means anything. Without elements that end by themselves: those by which
    a start adopts connections live for a minute."""
    said = json.loads(stage.node.run(["nft", "-j", "list", "table", *TABLE.split()]).stdout)
    return sorted((_plain(entry) for entry in said["nftables"] if "metainfo" not in entry), key=_name)


def _name(entry: dict[str, Any]) -> tuple[str, str]:
    ((kind, described),) = entry.items()
    return kind, described.get("chain" if kind == "rule" else "name", "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {
            key: _plain(each) for key, each in value.items() if key not in ("handle", "packets", "bytes", "expires")
        }
        if "elem" in plain and isinstance(plain["elem"], list):
            lasting = sorted((each for each in plain.pop("elem") if not _ends_by_itself(each)), key=repr)
            plain |= {"elem": lasting} if lasting else {}
        return plain
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def _ends_by_itself(element: Any) -> bool:
    return isinstance(element, dict) and "timeout" in element.get("elem", ())
