"""Every kind of destination, whoever the servers see, whatever the sysctls, in both families (reliability: all kinds of destination)."""

from __future__ import annotations

import itertools

import pytest

from .peers import ask
from .world import PORT, SERVICE_PORT, World

DESTINATIONS = {  # name: ((IPv4, IPv6), port, who answers)
    "service behind DNAT": (("10.96.0.10", "fd00:96::10"), SERVICE_PORT, "web"),
    "external": (("192.0.2.10", "2001:db8::10"), PORT, "web"),
    "same node": (("10.244.1.11", "fd00:244:1::11"), PORT, "b"),
    "self, by a service": (("10.96.0.11", "fd00:96::11"), SERVICE_PORT, "a"),
    "same node, by a service": (("10.96.0.13", "fd00:96::13"), SERVICE_PORT, "b"),
    "host network, by a service": (("10.96.0.12", "fd00:96::12"), SERVICE_PORT, "node"),
}


@pytest.mark.parametrize("selected", ["one pod selected", "both pods selected"])
def test_every_kind_of_destination_is_reached_through_the_proxy(
    world: World, selected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Facts 7, 8, 16: identity NAT, rules that no reverse lookup turns into martians, the pod's address upstream."""
    if selected == "both pods selected":
        from pellucid_proxy.kernel.state import KernelState

        members = dict.fromkeys([*world.state.members, *world.state.direct], 0)
        world.apply(KernelState(world.state.settings, world.state.groups, members))
    stand_in = world.stand_in()
    rows, failures = [], []
    for (name, (addresses, port, answers)), source, strict, version in itertools.product(
        DESTINATIONS.items(), ("Pod", "Node"), (0, 1), (4, 6)
    ):
        world.node.set_sysctls({f"net.ipv4.conf.all.{key}": str(strict) for key in ("rp_filter", "src_valid_mark")})
        stand_in.source = source
        stand_in.taken.clear()
        address = addresses[version == 6]
        pod = world.a.ipv6 if version == 6 else world.a.ipv4
        spoofed = source == "Pod" and answers != "a"  # a pod drops packets that bear its own address
        try:
            who, saw = ask(world.a, address, port, timeout_s=1.0).split()
            right = who == answers and (saw == pod) == spoofed and stand_in.taken == [(pod, address, port)]
            said = "ok" if right else f"{who} saw {saw}, taken {stand_in.taken}"
        except OSError as err:
            said = str(err)
        rows.append(f"{name:28} {source:5} src_valid_mark=rp_filter={strict} IPv{version}  {said}")
        if said != "ok":
            failures.append(rows[-1])
    with capsys.disabled():
        print(f"\n{selected}: {len(rows) - len(failures)} of {len(rows)}", *rows, sep="\n  ")
    assert not failures
