"""From facts to a verdict: pure, no allocation, on the path of every connection. Compiles unchanged with Cython.

Rule 1. A group's rules stand in one order: tier Admin, Application, Baseline; in a tier by policy priority, creation time (absent is
    newest), namespace and name; in a policy as written. The first rule that matches the flow wins.
Rule 2. A rule matches when its ports match (no ports: every protocol) and its destinations match (none given: every one).
    Ports match when any entry holds protocol and port; destinations match when any entry does.
Rule 3. A cidr matches by address. A domain matches by name, in TCP flows only: nothing else has a name that can be read.
Rule 4. A rule that matches by a cidr needs no name. Else a rule with domains whose ports match *asks* for the name:
    a. name UNKNOWN and no mismatch: the answer is NEED_NAME;
    b. mismatch, and its policy has hostMismatch Block: the flow is blocked, HostMismatch;
    c. encrypted, and its policy has encryptedClientHello Block: the flow is blocked, EncryptedClientHello;
    d. name ABSENT or mismatch, and its policy has missingSNI Block: the flow is blocked, NameMissing;
    e. name ABSENT or mismatch: the rule does not match;
    f. else it matches if one of its domains is the name, or "*." and a parent of the name.
    The refusals name the rule that asked. Rules are asked in order, and only up to the first that matches.
Rule 5. When the rule that matches is Pass, the rest of its tier is skipped.
Rule 6. When no rule of any tier matches, the verdict is the default action.

Hence NEED_NAME is given exactly when a rule that asks stands before the first that matches by address.
"""

from __future__ import annotations

from bisect import bisect_right

from .facts import ABSENT, ICMP, ICMPV6, UNKNOWN, Facts
from .program import NONE, Ports, Program, Tier
from .verdict import NEED_NAME, NeedName, Verdict

_BYTES = tuple(bytes((value,)) for value in range(256))


def decide(program: Program, facts: Facts) -> Verdict | NeedName:
    """Return the verdict on the flow, or NEED_NAME: come back with the name, or with ABSENT when there is none."""
    name = facts.name
    if name is UNKNOWN or name is ABSENT or facts.encrypted or facts.mismatch:
        return _decide_without_trust(program, facts)
    protocol = facts.protocol
    key = (ICMP if protocol == ICMPV6 else protocol) << 16 | facts.port
    address = facts.address
    for tier in program.tiers:
        rank = _by_address(tier, address, key)
        named = _by_name(tier, name, key)  # type: ignore[arg-type]  # UNKNOWN and ABSENT are dealt with above
        if named < rank:
            rank = named
        if rank != NONE:
            verdict = program.verdicts[rank]
            if verdict is not None:
                return verdict
    return program.default


def _decide_without_trust(program: Program, facts: Facts) -> Verdict | NeedName:
    """Rule 4 in full: the name is not known, absent, only the outer one, or contradicted."""
    name = facts.name
    protocol = facts.protocol
    key = (ICMP if protocol == ICMPV6 else protocol) << 16 | facts.port
    unknown = name is UNKNOWN and not facts.mismatch
    nameless = facts.mismatch or name is ABSENT
    for tier in program.tiers:
        rank = _by_address(tier, facts.address, key)
        if unknown:
            if _at(tier.named, key) < rank:
                return NEED_NAME
        else:
            named = NONE if nameless else _by_name(tier, name, key)  # type: ignore[arg-type]
            refusal, refusals = NONE, program.missing
            if facts.mismatch:
                refusal, refusals = _at(tier.mismatched, key), program.mismatched
            if facts.encrypted and _at(tier.encrypted, key) < refusal:
                refusal, refusals = _at(tier.encrypted, key), program.encrypted
            if nameless and _at(tier.missing, key) < refusal:
                refusal, refusals = _at(tier.missing, key), program.missing
            if refusal < rank and refusal <= named:
                return refusals[refusal]
            rank = min(rank, named)
        if rank != NONE:
            verdict = program.verdicts[rank]
            if verdict is not None:
                return verdict
    return program.default


def _at(ports: Ports, key: int) -> int:
    return ports.ranks[bisect_right(ports.starts, key) - 1]


def _by_address(tier: Tier, address: bytes, key: int) -> int:
    """Return the lowest rank among the rules that address and port alone make match."""
    ports = tier.any
    best = ports.ranks[bisect_right(ports.starts, key) - 1]
    for prefixes in tier.v4 if len(address) == 4 else tier.v6:
        if prefixes.least >= best:
            break
        whole = prefixes.whole
        head = address[:whole]
        if prefixes.keep:
            head += _BYTES[address[whole] & prefixes.keep]
        found = prefixes.table.get(head)
        if found is not None:
            rank = found.ranks[bisect_right(found.starts, key) - 1]
            if rank < best:
                best = rank
    return best


def _by_name(tier: Tier, name: str, key: int) -> int:
    """Return the lowest rank among the rules that have a domain for name."""
    best = NONE
    found = tier.exact.get(name)
    if found is not None:
        best = found.ranks[bisect_right(found.starts, key) - 1]
    suffixes = tier.suffixes
    if suffixes:
        dot = name.find(".")
        while dot >= 0:
            found = suffixes.get(name[dot + 1 :])
            if found is not None:
                rank = found.ranks[bisect_right(found.starts, key) - 1]
                if rank < best:
                    best = rank
            dot = name.find(".", dot + 1)
    return best
