"""Whose word counts: the command line's, then the folder's, then the default's."""

from __future__ import annotations

import msgspec
import pytest

from pellucid_proxy.agent.node_settings import Wishes, differences, marks, node_settings
from pellucid_proxy.settings import Marks, NodeSettings
from pellucid_proxy.supervisor.options import BAD_POLICY, Refusal, RunOptions

SCOPE = Wishes(scope=("192.0.2.0/24",))


def options(**given: object) -> RunOptions:
    return msgspec.convert({"policy": "p", **given}, RunOptions)


@pytest.mark.parametrize(
    ("flags", "wishes", "field", "value"),
    [
        ({}, {}, "source_address", "Pod"),
        ({}, {"source_address": "Node"}, "source_address", "Node"),
        ({"source_address": "Pod"}, {"source_address": "Node"}, "source_address", "Pod"),
        ({"workers": 3}, {"workers": 5}, "workers", 3),
        ({}, {"workers": 5}, "workers", 5),
        ({"scope": ["198.51.100.0/24"]}, {}, "scope", ("198.51.100.0/24",)),
        ({}, {}, "scope", ("192.0.2.0/24",)),
        ({}, {"scope": ("192.0.2.0/24", "192.0.2.0/24", "10.0.0.0/8")}, "scope", ("10.0.0.0/8", "192.0.2.0/24")),
        ({}, {"exclude": ("169.254.20.10/32",)}, "exclude", ("169.254.20.10/32",)),
        ({"allow_dial": ["169.254.169.254"]}, {}, "allow_dial", ("169.254.169.254/32",)),
        ({}, {"marks_mask": 0x30000}, "marks", Marks(0x30000, 0x20000, 0x10000, 0x30000)),
        ({"listen_port": 16001}, {}, "listen_port", 16001),
        ({"workers": 2}, {"connections": 101}, "max_connections", 51),
        ({"workers": 2}, {"connections_per_pod": 5}, "max_connections_per_pod", 3),
        ({"workers": 2}, {"connection_rate_per_pod": 5}, "connection_rate_per_pod", 5),
        ({}, {}, "ipv6", False),
        ({}, {"scope": ("2001:db8::/32",)}, "ipv6", True),
    ],
)
def test_flags_win_over_wishes_and_wishes_over_defaults(
    flags: dict[str, object], wishes: dict[str, object], field: str, value: object
) -> None:
    settings = node_settings(options(**flags), msgspec.structs.replace(SCOPE, **wishes))
    assert getattr(settings, field) == value


def test_the_default_mask_gives_the_default_marks() -> None:
    assert marks(Marks().mask) == Marks()


@pytest.mark.parametrize(
    ("flags", "wishes", "said"),
    [
        ({}, Wishes(), "--scope: nothing is in scope; give the pods' networks"),
        ({}, Wishes(scope=()), "--scope: nothing is in scope; give the pods' networks"),
        ({"scope": ["10.0.0.1/8"]}, Wishes(), "10.0.0.1/8 has host bits set; write a network such as 10.244.0.0/16"),
        ({}, Wishes(scope=("10.0.0.0/8",), marks_mask=0x1000), "0x1000 has not two bits; give two"),
        ({"allow_dial": ["metadata"]}, SCOPE, "--allow-dial: 'metadata' does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_cure(flags: dict[str, object], wishes: Wishes, said: str) -> None:
    with pytest.raises(Refusal) as raised:
        node_settings(options(**flags), wishes)
    assert said in str(raised.value)
    assert raised.value.status == BAD_POLICY


def test_what_differs_needs_a_restart_and_is_named() -> None:
    running = NodeSettings(scope=("192.0.2.0/24",))
    assert differences(running, running) == []
    assert differences(running, msgspec.structs.replace(running, scope=(), marks=Marks(mask=0x30000))) == [
        "scope: is 192.0.2.0/24, nothing is asked for; needs a restart of pellucid run",
        "marks: is 0x1040, 0x30000 is asked for; needs a restart of pellucid run",
    ]
