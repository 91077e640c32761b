"""What is never dialled on a pod's behalf; each denied address beside its nearest allowed one."""

from __future__ import annotations

import ipaddress

import pytest

from pellucid_proxy.session.dial_deny import denied, networks

NODE = frozenset(ipaddress.ip_address(text).packed for text in ("192.0.2.1", "2001:db8::1"))


def is_denied(address: str, *, node_source: bool = False, allow: tuple[str, ...] = ()) -> bool:
    return denied(
        ipaddress.ip_address(address).packed, node_source=node_source, node_addresses=NODE, allow=networks(allow)
    )


@pytest.mark.parametrize(
    ("never", "fine"),
    [
        ("127.0.0.1", "128.0.0.1"),
        ("127.255.255.255", "126.255.255.255"),
        ("0.0.0.0", "1.0.0.0"),
        ("0.1.2.3", "1.1.2.3"),
        ("224.0.0.1", "223.255.255.255"),
        ("239.255.255.255", "240.0.0.1"),
        ("255.255.255.255", "255.255.255.254"),
        ("169.254.0.1", "169.253.255.255"),
        ("192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::2"),
        ("::1", "2000::1"),
        ("::", "2000::"),
        ("::127.0.0.1", "::8.8.8.8"),
        ("::192.0.2.1", "::192.0.2.2"),
        ("::ffff:127.0.0.1", "64:ff9b::8.8.8.8"),
        ("::ffff:8.8.8.8", "2001:db8::8.8.8.8"),  # would leave as IPv4
        ("64:ff9b::127.0.0.1", "64:ff9b::128.0.0.1"),
        ("64:ff9b::192.0.2.1", "64:ff9b::192.0.2.2"),
        ("64:ff9b::169.254.1.1", "64:ff9b::169.253.1.1"),
        ("64:ff9b:1::127.0.0.1", "64:ff9b:2::127.0.0.1"),
        ("2002:7f00:1::", "2002:8000:1::"),
        ("2002:c000:201::5", "2002:c000:202::5"),
        ("fe80::1", "fec0::1"),
        ("febf::1", "fe00::1"),
        ("ff02::1", "fdff::1"),
    ],
)
@pytest.mark.parametrize("node_source", [False, True])
def test_addresses_that_only_the_node_should_reach(never: str, fine: str, node_source: bool) -> None:
    assert is_denied(never, node_source=node_source)
    assert not is_denied(fine, node_source=node_source)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.170.2",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
        "64:ff9b::169.254.169.254",
    ],
)
def test_metadata_services_answer_a_pod_for_itself_but_never_for_the_node(address: str) -> None:
    assert is_denied(address, node_source=True)
    assert not is_denied(address, node_source=False)


def test_an_installation_may_take_networks_off_the_list() -> None:
    allow = ("192.0.2.1/32", "169.254.169.254/32", "::1/128")
    for address in ("192.0.2.1", "169.254.169.254", "::1"):
        assert not is_denied(address, node_source=True, allow=allow)
    for address in ("127.0.0.1", "2001:db8::1", "64:ff9b::192.0.2.1", "169.254.169.253", "::"):
        assert is_denied(address, node_source=True, allow=allow)
