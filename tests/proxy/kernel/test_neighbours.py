"""Whose bits of marks are whose, as nft and iptables write them."""

from __future__ import annotations

import pytest

from pellucid_proxy.kernel.neighbours import colliding, overwriting, proxies, used


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        ("meta mark set meta mark | 0x00004000", 0x4000),
        ("meta mark set mark or 0x4000", 0x4000),
        ("meta mark set meta mark ^ 0x00004000", 0x4000),
        ("meta mark set meta mark & 0xff04ffff | 0x00040000", 0xFF0000 & ~0x40000 | 0x40000),
        ("meta mark set meta mark & 0xfff1ffff", 0xE0000),
        ("ct mark set ct mark | 0x00000080", 0x80),
        ("meta mark & 0x00000fff == 0x00000539 accept", 0xFFF),
        ("meta mark & 0x00004000 != 0x00000000 drop", 0x4000),
        ("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000", 0x4000),
        ("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN", 0x4000),
        ("-A c -j MARK --or-mark 0x40", 0x40),
        ("-A PREROUTING -i eni+ -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80", 0x80),
        ("-A c -p tcp -j TPROXY --on-port 1 --on-ip 127.0.0.1 --tproxy-mark 0x200/0xf00", 0xF00),
        # The whole mark: it compares bits that we keep, or is told of otherwise.
        ("meta mark 0x0000ca6c return", 0),
        ("meta mark set 0x00000539", 0),
        ("meta mark set ct mark", 0),
        ("meta mark set ct mark & 0x00000080", 0),
        ("-A c -j MARK --set-xmark 0x1/0xffffffff", 0),
        ("ip daddr 10.0.0.0/8 accept", 0),
    ],
)
def test_bits_that_a_rule_uses(rule: str, bits: int) -> None:
    assert used(rule) == bits


def test_only_rules_with_our_bits_collide() -> None:
    rules = [
        "meta mark set meta mark | 0x00004000",
        "meta mark & 0x00000fff == 0x00000539",
        "meta mark set meta mark | 0x00001000",
    ]
    assert [(rule, bits) for rule, bits in colliding(rules, 0x1040)] == [(rules[1], 0x40), (rules[2], 0x1000)]


def test_whole_marks_and_other_proxies_are_found() -> None:
    whole = [
        "meta mark set 0x00000539 accept",
        "meta mark set ct mark & 0x00000080",
        "-j MARK --set-xmark 0x1/0xffffffff",
    ]
    assert overwriting([*whole, "meta mark set meta mark | 0x1", "meta mark set ct mark"]) == whole
    taking = [
        "tproxy to :1",
        "tproxy ip to 127.0.0.1:1",
        "tproxy ip6 to [::1]:1",
        "-j TPROXY --on-port 1",
        "redirect to :3128",
        "-j REDIRECT",
    ]
    assert proxies([*taking, "masquerade"]) == taking
