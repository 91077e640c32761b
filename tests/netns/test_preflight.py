"""What stands in the way is said with its cure, before anything is changed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from pellucid_cli.lab.topology import Topology
from pellucid_proxy.kernel import routing
from pellucid_proxy.kernel.apply import Kernel, KernelError
from pellucid_proxy.kernel.instance import claim
from pellucid_proxy.kernel.preflight import preflight
from pellucid_proxy.kernel.state import boot_hold
from pellucid_proxy.settings import Marks, NodeSettings

from .world import SETTINGS


def found(topology: Topology, settings: NodeSettings = SETTINGS) -> list[str]:
    return [str(finding) for finding in topology.node.call(preflight, settings)]


def test_a_machine_that_can_do_it_has_no_findings_and_nothing_is_changed(topology: Topology) -> None:
    def ruleset_and_rules() -> str:
        return "".join(
            topology.node.run(command).stdout
            for command in (["nft", "list", "ruleset"], ["ip", "rule"], ["ip", "route"])
        )

    before = ruleset_and_rules()
    assert found(topology) == []
    assert ruleset_and_rules() == before


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            "rule add pref 900 fwmark 0x1000/0xf000 lookup 7",
            (
                "settings.marks.mask: `ip rule pref 900 from all fwmark 0x1000/0xf000 lookup 7` uses bits 0x1000 of our mark 0x1040; "
                "choose two bits that nobody uses"
            ),
        ),
        (
            "rule add pref 101 from 192.0.2.7 lookup main",
            (
                "settings.rule_pref: `ip rule pref 101 from 192.0.2.7/32 lookup 254` already has 101, and 100 to 102 are needed; "
                "choose another"
            ),
        ),
        (
            "rule add pref 900 iif lo lookup 15001",
            "settings.route_table: `ip rule pref 900 from all iif lo lookup 15001` already uses 15001; choose another",
        ),
    ],
)
def test_what_others_hold_is_named(topology: Topology, others: str, said: str) -> None:
    topology.node.run(["ip", *others.split()])
    assert found(topology) == [f"error: {said}"]
    with pytest.raises(KernelError) as refused:
        topology.node.call(routing.install, SETTINGS)
    assert str(refused.value) == said
    assert len(topology.node.run(["ip", "rule"]).stdout.splitlines()) == 4  # refused means nothing was added


@pytest.mark.parametrize(
    "others",
    [
        "rule add not fwmark 0xca6c lookup 51820",
        "rule add fwmark 0x80000/0xff0000 lookup 52",
        "rule add fwmark 0x1040/0x1040 lookup 51820",
    ],
)
def test_vpns_and_their_marks_are_no_collision(topology: Topology, others: str) -> None:
    topology.node.run(["ip", *others.split()])
    assert found(topology) == []
    topology.node.call(routing.install, SETTINGS)
    topology.node.call(routing.remove, SETTINGS)


def test_a_second_instance_is_refused_while_the_first_lives(topology: Topology) -> None:
    with topology.node.call(claim, SETTINGS):
        (said,) = found(topology)
        assert said.startswith(
            "error: settings.table: another pellucid owns the table pellucid in this network namespace; stop it"
        )
        other = topology.add_pod("other")  # another namespace is another world
        other.call(claim, SETTINGS).close()
    assert found(topology) == []


def test_rules_of_an_earlier_run_are_a_note(topology: Topology) -> None:
    topology.node.call(Kernel(SETTINGS).apply, boot_hold(SETTINGS))
    topology.node.call(routing.install, SETTINGS)
    assert found(topology) == ["note: the table inet pellucid of an earlier run is still there, and will be replaced"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_named(topology: Topology, address: str) -> None:
    with topology.node.listen(address, 15001):
        (said,) = found(topology)
    assert said == (
        f"error: settings.listen_port: {address} port 15001 cannot be had (Address already in use); "
        "choose another, or stop what uses it (`ss -tlnp sport = 15001`)"
    )


def test_ipv6_in_scope_but_off_is_refused(topology: Topology) -> None:
    topology.node.set_sysctls({"net.ipv6.conf.all.disable_ipv6": "1"})
    said = found(topology)
    assert said[0].startswith(
        "error: settings.scope[1]: fd00:244:1::/64 is IPv6, which is off here; leave it out, or enable IPv6"
    )
    with pytest.raises(KernelError, match=r"settings\.scope\[1\]"):
        topology.node.call(routing.install, SETTINGS)
    only4 = msgspec.structs.replace(SETTINGS, scope=("10.244.1.0/24",))
    assert found(topology, only4) == [
        "note: IPv6 is off on this machine: only IPv4 is covered, and nothing else can be sent"
    ]
    topology.node.call(routing.install, only4)
    assert topology.node.call(routing.missing, only4) == []
    topology.node.call(routing.remove, only4)


def test_ipv6_out_of_scope_is_a_warning(topology: Topology) -> None:
    (said,) = found(topology, msgspec.structs.replace(SETTINGS, scope=("10.244.1.0/24",)))
    assert said.startswith("warning: settings.scope: no IPv6 address is in scope: IPv6 traffic of pods passes unseen")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scope": ()}, "error: settings.scope: no addresses are in scope"),
        ({"scope": ("10.244.1.0/24", "fd00::1/64")}, "error: settings.scope[1]: fd00::1/64 has host bits set"),
        ({"exclude": ("nonsense",)}, "error: settings.exclude[0]: 'nonsense' does not appear to be an IPv4 or IPv6 network"),
        ({"allow_dial": ("10.0.0.0/33",)}, "error: settings.allow_dial[0]: '10.0.0.0/33' does not appear"),
        ({"marks": Marks(mask=0x1000)}, "error: settings.marks: 0x1000, 0x40, 0x1040 are not three different values under the mask 0x1000"),
        ({"marks": Marks(reply=0x1000)}, "error: settings.marks: 0x1000, 0x1000, 0x1040 are not three different values"),
        ({"table": "x; flush ruleset"}, "error: settings.table: 'x; flush ruleset' is no table name"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_named(topology: Topology, change: dict[str, object], said: str) -> None:
    assert any(
        line.startswith(said) and "; " in line for line in found(topology, msgspec.structs.replace(SETTINGS, **change))
    )


def test_bridges_that_call_iptables_are_a_warning(topology: Topology) -> None:
    topology.node.set_sysctls({"net.bridge.bridge-nf-call-iptables": "1"})
    assert found(topology) == []
    topology.node.run(["ip", "link", "add", "cni0", "type", "bridge"])
    (said,) = found(topology)
    assert said.startswith(
        "warning: net.bridge.bridge-nf-call-iptables is 1: connections of pods behind a bridge (cni0) time out"
    )


def test_sysctls_of_vpn_clients_are_a_note_and_no_forwarding_a_warning(topology: Topology) -> None:
    topology.node.set_sysctls({"net.ipv4.conf.all.src_valid_mark": "1", "net.ipv4.ip_forward": "0"})
    assert [said.split(":")[0] for said in found(topology)] == ["warning", "note"]


def test_without_rights_each_missing_capability_is_named(topology: Topology) -> None:
    said = topology.node.run(
        ["setpriv", "--inh-caps", "-all,+net_raw", "--bounding-set", "-all,+net_raw", sys.executable, "-c", _PREFLIGHT]
    ).stdout
    assert said.startswith(
        "error: the process lacks the capability NET_ADMIN; run as root, add the capability to the container"
    )
    assert "NET_RAW" not in said


_PREFLIGHT = """
from pellucid_proxy.kernel.preflight import preflight
from tests.netns.world import SETTINGS
print(*preflight(SETTINGS), sep="\\n")
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "error: nft: the command is missing; install the package nftables (1.0 or later)"),
        (
            "echo 'nftables v0.9.8 (E.D.S.)'",
            "error: nft: nftables v0.9.8 (E.D.S.) is too old; install nftables 1.0 or later",
        ),
    ],
)
def test_an_nft_that_is_missing_or_old_is_named(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
) -> None:
    if script is not None:
        command = tmp_path / "nft"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        lines = found(topology)
        assert said in lines
        if script is None:
            with pytest.raises(KernelError, match="the command is missing"):
                Kernel(SETTINGS).apply(boot_hold(SETTINGS))


def test_a_kernel_feature_that_is_missing_is_named(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This kernel has them all: an nft that speaks for another kernel stands before the real one."""
    command = tmp_path / "nft"
    command.write_text(_WITHOUT_TPROXY.format(nft=shutil.which("nft")))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (said,) = found(topology)
    assert said.startswith("error: the kernel's nftables lack: tproxy; load the modules nft_tproxy, ")


_WITHOUT_TPROXY = """#!/bin/sh
input=$(cat)
case "$input" in
*tproxy*) echo "/dev/stdin:1:1-9: Error: Could not process rule: No such file or directory" >&2; exit 1 ;;
esac
printf '%s\\n' "$input" | {nft} "$@"
"""
