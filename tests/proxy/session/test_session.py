"""Sessions as transcripts: what came, and what the session asks for next."""

from __future__ import annotations

import ipaddress
import ssl
from typing import Any

import pytest
import yaml

from pellucid_policy.compile import compile_policies
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.verdict import Action, Reason
from pellucid_proxy.engine import relay
from pellucid_proxy.session.ending import ENDINGS
from pellucid_proxy.session.judge import Enforced, Judge
from pellucid_proxy.session.session import DIAL, HOLD, RACE, REFUSE, WAIT, Session
from pellucid_proxy.settings import NodeSettings

POD = "10.244.1.10"
SERVER = "192.0.2.10"


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def judge(*rules: dict[str, Any], names: dict[str, str] | None = None, settings: NodeSettings | None = None) -> Judge:
    """A judge whose policy has these rules for every pod of namespace default; no rule matched: Allow."""
    policy = {
        "apiVersion": "pellucid.dev/v1alpha1",
        "kind": "TransparentPolicy",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"podSelector": {}, "rules": list(rules)} | ({"names": names} if names else {}),
    }
    objects = parse_files({"p.yaml": yaml.safe_dump(policy).encode()})
    assert isinstance(objects, Objects), objects
    made = Judge(settings or NodeSettings(scope=("10.244.0.0/16",)), [packed("192.0.2.1")])
    made.enforced = Enforced(compile_policies(objects))
    return made


def session(judge: Judge, port: int = 443, server: str = SERVER) -> Session:
    return Session(judge, packed(POD), packed(server), port)


def domain(name: str, action: str = "Block", **more: Any) -> dict[str, Any]:
    return {
        "name": name.replace(".", "-").strip("*-"),
        "match": {"destinations": [{"domain": name}]},
        "action": action,
    } | more


def cidr(network: str, action: str = "Block", **more: Any) -> dict[str, Any]:
    return {"name": "net", "match": {"destinations": [{"cidr": network}]}, "action": action} | more


REST_BLOCKED = {"name": "rest", "match": {}, "action": "Block"}


def hello(name: str) -> bytes:
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def get(host: str, path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def test_engine_and_session_number_steps_and_endings_alike() -> None:
    assert relay.steps == (WAIT, DIAL, RACE, REFUSE, HOLD)
    assert relay.endings == tuple(range(len(ENDINGS)))


def test_what_addresses_allow_is_dialled_before_any_byte() -> None:
    s = session(judge(cidr("192.0.2.0/24", "Allow"), domain("evil.example")))
    assert s.opened() == DIAL
    assert (s.target, s.spoof, s.verdict.action) == (None, True, Action.ALLOW)


def test_what_addresses_block_is_refused_before_any_byte() -> None:
    assert session(judge(cidr("192.0.2.0/24"))).opened() == REFUSE


def test_a_name_is_waited_for_and_decides() -> None:
    rules = judge(domain("evil.example"))
    for name, step in (("evil.example", REFUSE), ("good.example", DIAL)):
        s = session(rules)
        assert s.opened() == WAIT
        assert s.received(hello(name)) == step
        assert (s.name, s.protocol) == (name, "TLS")


def test_a_hello_in_pieces_decides_with_its_last_byte() -> None:
    rules, data = judge(domain("evil.example")), hello("evil.example")
    s = session(rules)
    assert {s.received(data[:cut]) for cut in range(1, len(data))} == {WAIT}
    assert s.received(data) == REFUSE


def test_bytes_that_decide_nothing_are_not_waited_for_where_addresses_decide() -> None:
    assert session(judge(cidr("192.0.2.0/24", "Allow"))).received(b"\x16\x03\x01") == DIAL


def test_a_hello_that_stops_in_the_middle_is_refused_and_not_taken_for_nameless() -> None:
    s = session(judge(domain("evil.example")))
    assert s.received(hello("evil.example")[:50]) == WAIT
    assert s.gave_up() == REFUSE
    assert s.verdict.reason is Reason.HOST_MISMATCH


def test_a_silent_client_races_where_the_rules_allow_it_without_a_name() -> None:
    s = session(judge(domain("evil.example")))
    assert (s.opened(), s.silent(), s.server_spoke()) == (WAIT, RACE, DIAL)
    assert s.protocol == "ServerFirst"


def test_a_silent_client_waits_where_they_do_not() -> None:
    s = session(judge(domain("good.example", "Allow"), REST_BLOCKED))
    assert (s.opened(), s.silent(), s.gave_up()) == (WAIT, WAIT, REFUSE)


def test_in_a_race_the_client_s_name_still_decides() -> None:
    rules = judge(domain("evil.example"))
    for name, step in (("evil.example", REFUSE), ("good.example", DIAL)):
        s = session(rules)
        assert (s.opened(), s.silent()) == (WAIT, RACE)
        assert s.received(hello(name)) == step
        assert not s.redial


def test_in_a_race_half_a_hello_does_not_pass_when_the_server_speaks() -> None:
    s = session(judge(domain("evil.example")))
    assert (s.opened(), s.silent()) == (WAIT, RACE)
    assert s.received(hello("evil.example")[:20]) == WAIT
    assert s.server_spoke() == REFUSE


def test_a_route_by_name_after_a_race_dials_anew() -> None:
    s = session(judge(domain("moved.example", "Route", route={"to": {"address": "192.0.2.20", "port": 8443}})))
    assert (s.opened(), s.silent()) == (WAIT, RACE)
    assert s.received(hello("moved.example")) == DIAL
    assert s.redial
    assert s.target == (packed("192.0.2.20"), 8443)


def test_a_routed_connection_goes_to_the_route_s_target_from_the_pod() -> None:
    s = session(judge(cidr("192.0.2.0/24", "Route", route={"to": {"address": "198.51.100.7", "port": 8080}})))
    assert s.opened() == DIAL
    assert (s.target, s.spoof, s.handshake) == ((packed("198.51.100.7"), 8080), True, None)


def test_a_route_into_the_other_family_leaves_from_the_node() -> None:
    s = session(judge(cidr("192.0.2.0/24", "Route", route={"to": {"address": "2001:db8::7", "port": 8080}})))
    assert s.opened() == DIAL
    assert not s.spoof


@pytest.mark.parametrize(("name", "host"), [("shop.example", b"shop.example:443"), (None, b"192.0.2.10:443")])
def test_an_upstream_proxy_is_asked_for_the_name_where_there_is_one(name: str | None, host: bytes) -> None:
    via = {"via": {"protocol": "HTTPConnect", "address": "198.51.100.9", "port": 3128}}
    s = session(judge(cidr("192.0.2.0/24", "Route", route=via)))
    assert (s.received(hello(name)) if name else s.opened()) == DIAL
    assert s.target == (packed("198.51.100.9"), 3128)
    assert s.handshake is not None
    assert host in s.handshake.greeting()


@pytest.mark.parametrize("target", ["127.0.0.1", "192.0.2.1", "0.0.0.0", "::1"])
def test_a_route_to_the_node_itself_is_never_dialled(target: str) -> None:
    s = session(judge(cidr("192.0.2.0/24", "Route", route={"to": {"address": target, "port": 80}})))
    assert s.opened() == REFUSE
    assert s.verdict.reason is Reason.DIAL_DENIED


def test_metadata_is_not_dialled_from_the_node_s_address() -> None:
    rules = (cidr("192.0.2.0/24"),)
    node = NodeSettings(scope=("10.244.0.0/16",), source_address="Node")
    assert session(judge(*rules, settings=node), server="169.254.169.254").opened() == REFUSE
    assert session(judge(*rules), server="169.254.169.254").opened() == DIAL


def test_the_node_s_address_is_used_where_it_is_asked_for() -> None:
    node = NodeSettings(scope=("10.244.0.0/16",), source_address="Node")
    s = session(judge(cidr("198.51.100.0/24"), settings=node))
    assert s.opened() == DIAL
    assert not s.spoof
    s = session(judge(cidr("192.0.2.0/24", "Allow", egress={"sourceAddress": "Pod"}), settings=node))
    assert s.opened() == DIAL
    assert s.spoof


def test_a_block_answers_as_its_rule_says() -> None:
    respond: dict[str, Any] = {"block": {"response": "Respond", "status": 451, "body": "not here"}}
    rules = judge(domain("evil.example", **respond), domain("gone.example", block={"response": "Drop"}))
    s = session(rules, 80)
    assert s.received(get("evil.example")) == REFUSE
    assert s.reply() is not None
    assert (s.reply() or b"").startswith(b"HTTP/1.1 451 ")
    s = session(rules)
    assert s.received(hello("evil.example")) == REFUSE
    assert s.reply() == b"\x15\x03\x03\x00\x02\x02\x31"
    assert session(rules).received(hello("gone.example")) == HOLD


def test_a_pod_that_no_policy_selects_passes() -> None:
    made = judge(cidr("192.0.2.0/24"))
    made.enforced = Enforced(compile_policies(Objects()))
    s = session(made)
    assert s.opened() == DIAL
    assert s.verdict.reason is Reason.NOT_SELECTED


def test_a_plain_http_connection_admitted_by_address_is_not_looked_into() -> None:
    s = session(judge(cidr("192.0.2.0/24", "Allow")), 80)
    assert s.received(get("a.example")) == DIAL
    assert s.guard is None


def test_every_request_of_a_connection_admitted_by_host_is_decided() -> None:
    s = session(judge(domain("good.example", "Allow"), REST_BLOCKED), 80)
    assert s.received(get("good.example", "/1")) == DIAL
    assert s.held == get("good.example", "/1")
    assert s.feed(get("good.example", "/2")) == (get("good.example", "/2"), None)
    passed, refused = s.feed(get("good.example", "/3") + get("evil.example"))
    assert (passed, refused) == (get("good.example", "/3"), "Denied")
    assert (s.verdict.action, s.verdict.rule and s.verdict.rule.rule) == (Action.BLOCK, "rest")
    assert s.name == "evil.example"


def test_a_pipelined_request_that_is_denied_does_not_go_with_the_first() -> None:
    s = session(judge(domain("evil.example")), 80)
    assert s.received(get("good.example") + get("evil.example")) == REFUSE
    assert s.verdict.action is Action.BLOCK


def test_a_later_request_that_would_go_elsewhere_is_refused() -> None:
    s = session(judge(domain("moved.example", "Route", route={"to": {"address": "192.0.2.20", "port": 80}})), 80)
    assert s.received(get("here.example")) == DIAL
    assert s.feed(get("moved.example"))[1] == "Denied"
    assert s.verdict.reason is Reason.UNDECIDABLE


def test_two_hosts_are_refused_with_a_status() -> None:
    s = session(judge(domain("good.example", "Allow")), 80)
    assert s.received(b"GET / HTTP/1.1\r\nHost: good.example\r\nHost: evil.example\r\n\r\n") == REFUSE
    assert s.verdict.reason is Reason.HOST_MISMATCH


def test_bytes_behind_an_upgrade_go_when_the_server_switches() -> None:
    s = session(judge(domain("evil.example")), 80)
    upgrade = b"GET / HTTP/1.1\r\nHost: good.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert s.received(upgrade) == DIAL
    assert s.feed(b"\x81\x80") == (b"", None)
    responses = s.responses()
    assert responses is not None
    answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
    assert responses.feed(answer) == (answer, None)
    assert (responses.released, responses.opaque, s.opaque) == (b"\x81\x80", True, True)


def test_an_audit_rule_is_recorded_and_does_not_act() -> None:
    s = session(judge(domain("evil.example", mode="Audit")))
    assert s.opened() == WAIT
    assert s.received(hello("evil.example")) == DIAL
    assert s.audited is not None
    assert s.audited.action is Action.BLOCK


def test_an_audit_rule_does_not_hold_up_a_silent_client() -> None:
    s = session(judge(domain("evil.example", mode="Audit")))
    assert (s.opened(), s.silent()) == (WAIT, RACE)


def test_a_new_policy_decides_what_is_not_decided_yet() -> None:
    made = judge(domain("evil.example"))
    s = session(made)
    assert s.opened() == WAIT
    made.enforced = judge(cidr("0.0.0.0/0")).enforced
    assert s.received(hello("good.example")) == REFUSE
