"""Compare decide with the reference model on random policies and flows, and the kernel's lists with decide.

    python -m tests.policy.algebra --cases 1000000 [--seed N]

A case is one flow of one pod under one set of policies, enforced or audited. Exit status 1 if any case differs; the first ones are printed.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from random import Random, SystemRandom

import msgspec

from pellucid_policy.compile import Group, PolicySet, compile_policies
from pellucid_policy.decide import decide
from pellucid_policy.facts import ABSENT, ICMP, ICMPV6, TCP, UNKNOWN, Facts
from pellucid_policy.meta import Pod
from pellucid_policy.model import Policy
from pellucid_policy.objects import Objects
from pellucid_policy.plan import AddressRule
from pellucid_policy.verdict import Action, Response

from . import generate
from .reference import Outcome, Reference, outcome_of

FLOWS = 120  # of one pod under one set of policies


@dataclass
class Tally:
    """What a run found. need: cases that wait for a name; kernel: comparisons with the kernel's lists."""

    cases: int = 0
    need: int = 0
    kernel: int = 0
    mismatches: list[str] = field(default_factory=list)


def run(cases: int, seed: int) -> Tally:
    """Compare at least `cases` cases; the same seed gives the same ones."""
    random = Random(seed)
    tally = Tally()
    while tally.cases < cases:
        objects = generate.objects(random)
        default = random.choice(("Allow", "Block"))
        _compare(random, objects, default, tally)
    return tally


def _compare(random: Random, objects: Objects, default: str, tally: Tally) -> None:
    compiled = compile_policies(objects, default_action=default)
    reference = Reference(objects, default)
    of_pod = {(pod.namespace, pod.name): pod.group for pod in compiled.pods}
    seen: set[int | None] = set()
    for pod in objects.pods:
        policies = reference.policies_of(pod)
        group = of_pod[pod.metadata.namespace, pod.metadata.name]
        expected = [(each.kind, each.namespace, each.metadata.name) for each in policies]
        if expected != _policies(compiled, group):
            tally.mismatches.append(
                f"policies of {pod.metadata.name}: {expected}, compiled {_policies(compiled, group)}"
            )
        elif group is not None and group not in seen:
            _compare_group(random, compiled.groups[group], reference, policies, pod, tally)
        seen.add(group)


def _policies(compiled: PolicySet, group: int | None) -> list[tuple[str, str, str]]:
    return [] if group is None else [(each.kind, each.namespace, each.name) for each in compiled.groups[group].policies]


def _compare_group(
    random: Random, group: Group, reference: Reference, policies: list[Policy], pod: Pod, tally: Tally
) -> None:
    for _ in range(FLOWS):
        flow = generate.facts(random)
        audited = group.audited is not None and random.random() < 0.3
        program = group.audited if audited and group.audited is not None else group.enforced
        got, expected = outcome_of(decide(program, flow)), reference.decide(policies, flow, audited)
        tally.cases += 1
        tally.need += expected == "NEED"
        if got != expected:
            tally.mismatches.append(
                f"{pod.metadata.name} {flow}, audited {audited}: {got}, reference {expected}\n  {policies}"
            )
        if not audited:
            tally.kernel += 1
            if why := kernel_difference(group, flow):
                tally.mismatches.append(f"kernel: {why}\n  {policies}")


def kernel_difference(group: Group, flow: Facts) -> str:
    """Return where the kernel's lists and decide differ on a flow, or nothing. Only its addresses are looked at."""
    absent = msgspec.structs.replace(flow, name=ABSENT, encrypted=False, mismatch=False)
    wanted = outcome_of(decide(group.enforced, absent))
    found = first(group.kernel.nameless, flow)
    if found is None or _as_blocked(wanted) != _kernel_outcome(found):
        return f"nameless {found}, decide {wanted} on {absent}"
    lead = first(group.kernel.leading, flow) if flow.protocol == TCP else None
    if lead is not None:
        waiting = outcome_of(decide(group.enforced, msgspec.structs.replace(absent, name=UNKNOWN)))
        if _kernel_outcome(lead) != waiting[:7] or waiting[-2:] != (None, None):  # nothing is left for the proxy to do
            return f"leading {lead}, decide {waiting} on {flow}"
    return ""


def _as_blocked(outcome: Outcome) -> tuple[str, ...]:
    """What the kernel is to do where the proxy would do more than let pass or refuse."""
    assert not isinstance(outcome, str), "nothing waits for a name that is absent"
    action, reason, kind, namespace, policy, rule, response = outcome[:7]
    if action in (Action.ROUTE, Action.INTERCEPT):
        action, reason, response = "Block", "NotRoutable", "Reset"
    return action, reason, kind, namespace, policy, rule, "Reset" if response == Response.RESPOND else response


def _kernel_outcome(rule: AddressRule) -> tuple[str, ...]:
    key = rule.rule
    who = ("", "", "", "") if key is None else (key.kind, key.namespace, key.policy, key.rule)
    return ("Allow" if rule.allow else "Block", rule.reason, *who, str(rule.response))


def first(rules: tuple[AddressRule, ...], flow: Facts) -> AddressRule | None:
    """Return the rule that the kernel would find."""
    address = ipaddress.ip_address(flow.address)
    protocol = ICMP if flow.protocol == ICMPV6 else flow.protocol
    for rule in rules:
        ports = rule.ports is None or any(p.protocol == protocol and p.first <= flow.port <= p.last for p in rule.ports)
        if ports and (rule.networks is None or any(address in _network(text) for text in rule.networks)):
            return rule
    return None


@cache
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    began = time.monotonic()
    tally = run(options.cases, seed)
    for each in tally.mismatches[:5]:
        print(each)
    print(
        f"policy algebra: {tally.cases} cases against the reference model ({tally.need} wait for a name), {tally.kernel} against the "
        f"kernel's lists: {len(tally.mismatches)} mismatches, seed {seed}, {time.monotonic() - began:.1f} s"
    )
    return 1 if tally.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
