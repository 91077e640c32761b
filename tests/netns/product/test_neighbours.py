"""Beside what others put into a node, it works, or preflight refuses and says why: their real rules and sysctls, in the node."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http

from .conftest import Figure
from .stage import VERSIONS, Stage, address_of, policy

SITE, FORBIDDEN = "site.example", "forbidden.example"
RULES = policy(f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
""")


class Neighbour(NamedTuple):
    """ip: arguments of `ip`. nft: rules. refused: what the reason must hold; "": it works. said: what is said besides."""

    name: str
    ip: tuple[str, ...] = ()
    nft: str = ""
    sysctls: tuple[tuple[str, str], ...] = ()
    refused: str = ""
    said: str = ""


BOTH = ("-4", "-6")
NEIGHBOURS = (
    Neighbour(
        "wg-quick",  # wg-quick(8), linux.bash: add_default
        ip=tuple(
            f"{v} rule add {rule}"
            for v in BOTH
            for rule in ("not fwmark 51820 table 51820", "table main suppress_prefixlength 0")
        ),
        nft="""table ip wg-quick-wg0 {
            chain preraw { type filter hook prerouting priority -300; iifname != "wg0" ip daddr 10.9.0.2 fib saddr type != local drop; }
            chain premangle { type filter hook prerouting priority -150; meta l4proto udp meta mark set ct mark; }
            chain postmangle { type filter hook postrouting priority -150; meta l4proto udp mark 51820 ct mark set mark; }
        }""",
        sysctls=(("net.ipv4.conf.all.src_valid_mark", "1"),),
        said="src_valid_mark is 1",
    ),
    Neighbour(
        "Tailscale",  # util/linuxfw, wgengine/router: rules 5210 to 5270, marks 0xff0000
        ip=tuple(
            f"{v} rule add pref {rule}"
            for v in BOTH
            for rule in (
                "5210 fwmark 0x80000/0xff0000 lookup main",
                "5230 fwmark 0x80000/0xff0000 lookup default",
                "5250 fwmark 0x80000/0xff0000 type unreachable",
                "5270 lookup 52",
            )
        ),
        nft="""table inet ts {
            chain ts-forward { type filter hook forward priority 0;
                iifname "tailscale0*" counter meta mark set mark and 0xff00ffff xor 0x40000
                meta mark & 0x00ff0000 == 0x00040000 accept; }
            chain ts-postrouting { type nat hook postrouting priority 100; meta mark & 0x00ff0000 == 0x00040000 masquerade; }
        }""",
        sysctls=(("net.ipv4.conf.all.src_valid_mark", "1"), ("net.ipv4.conf.all.rp_filter", "2")),
    ),
    Neighbour(
        "Calico",  # felix: NftablesMarkMask 0xffff0000
        nft="""table inet calico { chain filter-FORWARD { type filter hook forward priority 0;
            iifname "cali*" meta mark set mark & 0xfff1ffff
            meta mark & 0x00010000 == 0x00010000 accept
            meta mark set mark or 0x00010000; } }""",
    ),
    Neighbour(
        "Calico with another mask",  # FelixConfiguration iptablesMarkMask: 0xff00
        nft="table inet calico { chain c { type filter hook forward priority 0; meta mark & 0x00001000 == 0x00001000 accept; } }",
        refused="uses bits 0x1000 of our mark 0x1040",
    ),
    Neighbour(
        "Cilium",  # pkg/datapath/linux: tables 2004, 2005, proxy marks 0x200/0xf00
        ip=tuple(
            f"{v} rule add pref {rule}"
            for v in BOTH
            for rule in ("9 fwmark 0x200/0xf00 lookup 2004", "10 fwmark 0xa00/0xf00 lookup 2005")
        ),
        nft="""table inet cilium {
            chain pre { type filter hook prerouting priority -150;
                meta mark & 0x00000f00 == 0x00000200 meta l4proto tcp tproxy ip to 127.0.0.1:34567 accept; }
            chain post { type nat hook postrouting priority 100; meta mark & 0x00000f00 == 0x00000e00 accept; }
        }""",
        said="another transparent proxy",
    ),
    Neighbour(
        "kube-proxy",  # masquerade bit 14, drop bit 15
        nft="""table ip kube-proxy {
            chain marking { meta mark set mark or 0x00004000; }
            chain post { type nat hook postrouting priority 100;
                meta mark & 0x00004000 == 0x00000000 return; meta mark set mark xor 0x00004000; masquerade fully-random; }
            chain drops { type filter hook forward priority 0; meta mark & 0x00008000 == 0x00008000 drop; }
        }""",
    ),
    Neighbour(
        "AWS CNI",  # amazon-vpc-cni-k8s networkutils: connmark 0x80, rules 512, 1024, 1536
        ip=(
            "rule add pref 512 to 10.244.1.10 lookup main",
            "rule add pref 1024 fwmark 0x80/0x80 lookup main",
            "rule add pref 1536 from 10.244.1.10 lookup 2",
        ),
        nft="""table ip aws { chain pre { type filter hook prerouting priority -150;
            iifname "eth0" fib daddr type local ct mark set ct mark or 0x00000080; } }""",
    ),
    Neighbour(
        "portmap",  # containernetworking plugins: markMasqBit 13
        nft="""table ip cni { chain m { meta mark set mark or 0x00002000; }
            chain post { type nat hook postrouting priority 100; meta mark & 0x00002000 == 0x00002000 masquerade; } }""",
    ),
    Neighbour(
        "Istio in the node",  # tools/istio-iptables, ambient: 0x539/0xfff, 0x111/0xfff, table 100
        ip=("rule add pref 32764 fwmark 0x111/0xfff lookup 100",),
        nft="table inet istio { chain c { type filter hook prerouting priority -150; meta mark & 0x00000fff == 0x00000539 accept; } }",
        refused="of our mark 0x1040",
    ),
    Neighbour(
        "another transparent proxy",  # as in the kernel's Documentation/networking/tproxy.rst, by a masked mark of ours
        ip=("rule add fwmark 0x40/0x40 lookup 100",),
        nft="table inet squid { chain c { type filter hook prerouting priority -150; tcp dport 80 tproxy ip to 127.0.0.1:99 accept; } }",
        refused="uses bits 0x40 of our mark 0x1040",
    ),
    Neighbour(
        "a bridge that calls iptables",
        ip=("link add cni0 type bridge",),
        sysctls=(("net.bridge.bridge-nf-call-iptables", "1"),),
        said="bridge-nf-call-iptables is 1",
    ),
    Neighbour(
        "our table's routes",
        ip=("route add 198.51.100.0/24 dev srv-web table 15001",),
        refused="table 15001 already holds a route",
    ),
)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as built:
        built.serve("web", {80: speak_http})
        built.write("policy.yaml", RULES)
        yield built


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)
def test_beside_others_it_works_or_says_why_not(stage: Stage, figure: Figure, neighbour: Neighbour) -> None:
    node, a = stage.node, stage["a"]
    for words in neighbour.ip:
        node.run(["ip", *words.split()])
    if neighbour.nft:
        node.nft(neighbour.nft.replace("} }", "}\n}").replace("; }", ";\n}") + "\n")
    if any(not Path("/proc/sys", *name.split(".")).exists() for name, _ in neighbour.sysctls):
        pytest.skip("this kernel has no such sysctl")
    node.set_sysctls(dict(neighbour.sysctls))
    before = stage.left_behind()
    status, said = _preflight(stage)
    assert stage.left_behind() == before, "preflight has changed something"
    if neighbour.refused:
        assert status == 3, said
        assert any(each["severity"] == "error" and neighbour.refused in each["what"] and each["cure"] for each in said)
        started = node.run(stage.command(state=stage.folder / "state"), check=False)
        assert started.returncode == 3
        assert neighbour.refused in started.stderr
        assert stage.left_behind() == before
    else:
        assert status == 0, said
        assert any(neighbour.said in each["what"] for each in said) or not neighbour.said
        with stage.run() as instance:
            for version in VERSIONS:
                assert get(a, address_of(stage["web"], version), 80, SITE).end == "answered", instance.log_end()
                assert get(a, address_of(stage["web"], version), 80, FORBIDDEN).end == "reset"
        assert stage.left_behind() == before
    figure(f"beside {neighbour.name}", f"refused: {neighbour.refused}" if neighbour.refused else "works")


def test_an_old_nft_is_refused_by_preflight(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nft").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo \'nftables v0.9.8\' && exit\nexec {shutil.which("nft")} "$@"\n'
    )
    (folder / "nft").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    status, said = _preflight(stage)
    assert status == 3
    assert [each["what"] for each in said if each["severity"] == "error"] == ["nft: nftables v0.9.8 is too old"]


def test_preflight_says_that_an_instance_runs(stage: Stage) -> None:
    with stage.run():
        status, said = _preflight(stage)
        assert status == 1
        assert "another pellucid owns the table" in said[0]["what"]


def _preflight(stage: Stage) -> tuple[int, list[dict[str, str]]]:
    command = [sys.executable, "-m", "pellucid_cli", "preflight", "--policy", str(stage.policy)]
    done = stage.node.run(command, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]
