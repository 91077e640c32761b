"""What others change among the kernel rules is put right within a second, whatever it is."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import TlsSession, get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import Arrival, speak_http, speak_https
from pellucid_cli.lab.topology import POD_GATEWAYS, Namespace
from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import TABLE, Stage, kill, policy, process_ids, tap
from .test_start_and_stop import _echoes, speak_echo

SITE, FORBIDDEN = "site.example", "forbidden.example"
LIMIT_S = 1.0
METRICS = "127.0.0.1:9464"
PELLUCID = (sys.executable, "-m", "pellucid_cli")
AT_ONCE = 50
EVERY = os.environ.get("PELLUCID_DRIFT") == "every"
"""Every rule, chain and set in turn; else AT_ONCE of them, drawn."""
RULES = policy(
    f"""
  - {{name: dns, match: {{ports: [{{port: 53, protocol: UDP}}]}}, action: Allow}}
  - {{name: address, match: {{destinations: [{{cidr: 192.0.2.11/32}}]}}, action: Allow}}
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""
)

Change = Callable[[], None]


def nft(stage: Stage, text: str) -> None:
    stage.node.nft(text)


def held(stage: Stage) -> tuple[str, ...]:
    """Everything of ours in the kernel, without what counts and what runs out."""
    table = stage.node.run(["nft", "-s", "list", "table", *TABLE.split()], check=False).stdout
    blocks = sorted(block.strip() for block in table.strip().removesuffix("}").partition("{")[2].split("\n\n"))
    kept = [block for block in blocks if not block.startswith(("set adopting", "set stranger"))]
    # Rules of one preference are exclusive of each other: their order says nothing.
    rules = ["\n".join(sorted(stage.node.run(["ip", v, "rule"]).stdout.splitlines())) for v in ("-4", "-6")]
    routes = [
        stage.node.run(["ip", family, "route", "show", "table", "15001"], check=False).stdout for family in ("-4", "-6")
    ]
    return ("\n\n".join([table.partition("{")[0], *kept]), *rules, *routes)


def of_tables(stage: Stage) -> Iterator[tuple[str, Change]]:
    """Each thing in our table away or changed, singly, in ways that the kernel permits."""
    said = json.loads(stage.node.run(["nft", "-j", "-a", "list", "table", *TABLE.split()]).stdout)["nftables"]
    yield "flush ruleset", partial(nft, stage, "flush ruleset")
    yield "delete table", partial(nft, stage, f"delete table {TABLE}")
    yield "flush table", partial(nft, stage, f"flush table {TABLE}")
    yield "table made dormant", partial(nft, stage, f"table {TABLE} {{ flags dormant; }}")
    yield "firewalld-style reload", partial(nft, stage, "flush ruleset\ntable inet firewalld { chain c { accept; }; }")
    for entry in said:
        for kind, what in entry.items():
            if kind == "chain":
                name = what["name"]
                yield f"flush chain {name}", partial(nft, stage, f"flush chain {TABLE} {name}")
                yield f"insert into chain {name}", partial(nft, stage, f"insert rule {TABLE} {name} accept")
                if "hook" in what:
                    yield (
                        f"delete chain {name}",
                        partial(nft, stage, f"flush chain {TABLE} {name}; delete chain {TABLE} {name}"),
                    )
                    yield f"policy of chain {name}", partial(nft, stage, f"chain {TABLE} {name} {{ policy drop; }}")
            elif kind in ("set", "map") and what.get("elem") and "timeout" not in what.get("flags", ()):
                yield f"flush {kind} {what['name']}", partial(nft, stage, f"flush {kind} {TABLE} {what['name']}")
            elif kind == "rule":
                yield (
                    f"delete rule {what['handle']} of {what['chain']}",
                    partial(_delete_rule, stage, what["chain"], _number_of(said, what)),
                )
    yield (
        "chain deleted with all that leads to it",
        partial(nft, stage, f"flush table {TABLE}; delete chain {TABLE} syns"),
    )
    yield "counter deleted", partial(nft, stage, f"flush table {TABLE}; delete counter {TABLE} refused")
    yield (
        "set deleted",
        partial(nft, stage, f"flush table {TABLE}; delete set {TABLE} scope4; delete set {TABLE} exclude6"),
    )
    yield "element added", partial(nft, stage, f"add element {TABLE} exclude4 {{ 192.0.2.10 }}")
    yield "pod made direct", partial(nft, stage, f"add element {TABLE} direct4 {{ 10.244.1.10 }}")
    yield "pod deleted", partial(nft, stage, f"delete element {TABLE} member4 {{ {stage['a'].ipv4} }}")
    yield (
        "chain added",
        partial(nft, stage, f"table {TABLE} {{ chain theirs {{ type filter hook forward priority 0; drop; }}; }}"),
    )
    yield "quota added", partial(nft, stage, f"add quota {TABLE} theirs over 1 mbytes")
    yield "marker deleted", partial(_delete_marker, stage)


def _number_of(said: list[dict[str, dict[str, object]]], rule: dict[str, object]) -> int:
    own = [each["rule"]["handle"] for each in said if "rule" in each and each["rule"]["chain"] == rule["chain"]]
    return own.index(rule["handle"])


def _delete_rule(stage: Stage, chain: str, number: int) -> None:
    """Handles change with every repair, places do not."""
    said = json.loads(stage.node.run(["nft", "-j", "-a", "list", "chain", *TABLE.split(), chain]).stdout)["nftables"]
    handle = [each["rule"]["handle"] for each in said if "rule" in each][number]
    nft(stage, f"delete rule {TABLE} {chain} handle {handle}")


def _delete_marker(stage: Stage) -> None:
    (name,) = re.findall(r"chain (state_\w+)", stage.node.run(["nft", "list", "table", *TABLE.split()]).stdout)
    nft(stage, f"delete chain {TABLE} {name}")


def of_routes(stage: Stage) -> Iterator[tuple[str, Change]]:
    """Each ip rule and route away, and foreign ones among them."""

    def ip(*words: str) -> Change:
        return partial(_ip, stage, *words)

    for family in ("-4", "-6"):
        for line in stage.node.run(["ip", family, "rule"]).stdout.splitlines():
            pref, _, what = line.partition(":\t")
            if pref in ("100", "101", "102"):
                words = re.sub(r" \[unresolved\]| proto kernel", "", what.strip()).split()
                yield f"ip {family} rule {pref} {what}", ip(family, "rule", "del", "pref", pref, *words)
        yield f"ip {family} rules flushed", partial(_flush_rules, stage, family)
        yield f"ip {family} route", ip(family, "route", "flush", "table", "15001")
        far, near = ("198.51.100.0/24", "192.0.2.10") if family == "-4" else ("2001:db8:9::/48", "2001:db8::10")
        yield (
            f"ip {family} foreign route",
            ip(family, "route", "add", far, "via", near, "dev", "srv-web", "onlink", "table", "15001"),
        )
        yield (
            f"ip {family} foreign rule to our table",
            ip(family, "rule", "add", "from", far, "lookup", "15001", "pref", "9000"),
        )
        yield (
            f"ip {family} foreign rule at our preference",
            ip(family, "rule", "add", "to", far, "lookup", "77", "pref", "101"),
        )
        yield (
            f"ip {family} foreign rule for all at our preference",
            ip(family, "rule", "add", "lookup", "15001", "pref", "101"),
        )
    yield "lo down and up", partial(_down_and_up, stage, "lo")
    yield "link of a pod down and up", partial(_link_of_pod_down_and_up, stage)


def _ip(stage: Stage, *words: str) -> None:
    stage.node.run(["ip", *words])


def _flush_rules(stage: Stage, family: str) -> None:
    """As a network manager does that knows only its own."""
    for pref in ("100", "101", "102"):
        while stage.node.run(["ip", family, "rule", "del", "pref", pref], check=False).returncode == 0:
            pass


def _down_and_up(stage: Stage, interface: str) -> None:
    stage.node.run(["ip", "link", "set", interface, "down"])
    stage.node.run(["ip", "link", "set", interface, "up"])


def _link_of_pod_down_and_up(stage: Stage) -> None:
    """With the pod's routes put there again as a CNI does: they go with the link."""
    pod = stage["a"]
    _down_and_up(stage, pod.interface)
    stage.node.run(["ip", "address", "add", f"{POD_GATEWAYS[1]}/128", "dev", pod.interface, "nodad"])
    for address, gateway in zip(pod.addresses, POD_GATEWAYS, strict=True):
        stage.node.run(["ip", "route", "replace", address, "dev", pod.interface, "src", gateway])


def repaired_after(stage: Stage, wanted: tuple[str, ...], change: Change, name: str) -> float:
    """Seconds from the change's end until all is as it was, seen from outside."""
    change()
    began = time.monotonic()
    assert eventually(lambda: held(stage) == wanted, 10.0), (
        f"{name} is not repaired: {_difference(wanted, held(stage))}"
    )
    return time.monotonic() - began


def _difference(wanted: tuple[str, ...], found: tuple[str, ...]) -> str:
    lost = [line for a, b in zip(wanted, found, strict=True) for line in set(a.splitlines()) - set(b.splitlines())]
    come = [line for a, b in zip(wanted, found, strict=True) for line in set(b.splitlines()) - set(a.splitlines())]
    return f"missing {lost}, too much {come}"


@pytest.mark.parametrize("what", ["tables", "routes"])
def test_every_kind_of_drift_is_repaired_within_a_second(tmp_path: Path, figure: Figure, what: str) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http, 443: speak_https})
        stage.serve("other", {7: speak_echo})
        stage.write("policy.yaml", RULES)
        a, web, other = stage["a"], stage["web"], stage["other"]
        with stage.run("--workers", "1"):
            kinds = list(of_tables(stage) if what == "tables" else of_routes(stage))
        seed = random.SystemRandom().randrange(10_000)
        if not EVERY and what == "tables":
            kinds = random.Random(seed).sample(kinds, AT_ONCE)
        took: dict[str, float] = {}
        for start in range(0, len(kinds), AT_ONCE):  # more in a minute are taken for a fight
            with (
                stage.run("--workers", "1", drain_s=0.0) as instance,
                TlsSession(a, web.ipv4, 443, SITE) as relayed,
                TlsSession(a, web.ipv6, 443, SITE) as relayed6,
                a.connect(other.ipv4, 7) as direct,
            ):
                wanted = held(stage)
                assert "state_" in wanted[0]
                for name, change in kinds[start : start + AT_ONCE]:
                    took[name] = repaired_after(stage, wanted, change, name)
                    assert relayed.request().end == relayed6.request().end == "answered", (
                        f"{name} cut a live connection"
                    )
                    assert _echoes(direct), f"{name} cut a live connection past the proxy"
                for address in web.addresses:
                    assert get(a, address, 80, SITE).end == "answered", instance.log_end()
                    assert get(a, address, 80, FORBIDDEN).end == "reset"
        ranked = sorted(took.values())
        slowest = max(took, key=lambda name: took[name])
        figure(
            f"drift, {what}",
            f"{len(took)} of {len(kinds)} repaired while live connections go on, after p50 {statistics.median(ranked) * 1000:.0f} ms, "
            f"p99 {ranked[-1 - len(ranked) // 100] * 1000:.0f} ms, max {ranked[-1] * 1000:.0f} ms ({slowest}; seed {seed})",
        )
        assert ranked[-1] < LIMIT_S, slowest


def speak_count(client: socket.socket, arrival: Arrival) -> None:
    """Says a line every few milliseconds, as long as somebody takes it."""
    for number in itertools.count():
        client.sendall(b"%d\n" % number)
        time.sleep(0.01)  # the pace of the server, no waiting for anything


def test_what_slips_through_is_counted_and_does_not_live_on(tmp_path: Path, figure: Figure) -> None:
    """Somebody flushes all rules while the agent is held; a closed pod then reaches a server that it must not."""
    with Stage(tmp_path, pods=("closed",)) as stage:
        stage.serve("other", {7: speak_count, 8: speak_echo})
        closed, other = stage["closed"], stage["other"]
        stage.write("policy.yaml", policy("  - {match: {}, action: Block}", pod="closed"))
        with stage.run("--workers", "1", "--metrics", METRICS) as instance:
            packets = _packets_from(closed, other)
            for address in other.addresses:
                assert _opened(closed, address, 7) is None, "the policy is not enforced"
            agent = process_ids(instance)["agent"]
            os.kill(agent, signal.SIGSTOP)
            stage.node.nft("flush ruleset")
            slipped = [_opened(closed, address, port) for address in other.addresses for port in (7, 8)]
            alive = [connection for connection in slipped if connection is not None]
            assert len(alive) == len(slipped) == 4
            meanwhile = packets()
            os.kill(agent, signal.SIGCONT)
            assert eventually(lambda: _metric(stage, "leaked_connections_total", outcome="ended") > 0, 10.0)
            counted, reached = _metric(stage, "leaked_packets_total"), packets()
            connections = _metric(stage, "leaked_connections_total", outcome="ended")
            assert eventually(lambda: all(map(_is_dead, alive)), 10.0), "it lives on"
            late = packets() - reached
            for address in other.addresses:
                assert _opened(closed, address, 7) is None
            for connection in alive:
                connection.close()
        figure(
            "what slips through while rules are away",
            f"{connections:.0f} of {len(alive)} connections of a closed pod counted, and {counted:.0f} packets, of {meanwhile} "
            f"that arrived before the repair and {reached} until just after; all {len(alive)} are ended, {late} packets later",
        )
        assert connections == len(alive)
        assert meanwhile <= counted <= reached


def test_who_fights_for_the_rules_is_named_and_met_with_patience(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path, pods=("closed",)) as stage:
        closed, other = stage["closed"], stage["other"]
        stage.write("policy.yaml", policy("  - {match: {}, action: Block}", pod="closed"))
        with stage.run("--workers", "1", "--metrics", METRICS) as instance:
            with _rules_kept_away(stage):
                assert eventually(lambda: bool(read_status(str(instance.state)).rules), 30.0), instance.log_end()
            (said,) = read_status(str(instance.state)).rules
            assert said.startswith("nft changes our kernel rules again and again: the next repair waits ")
            shown = stage.node.run([*PELLUCID, "status", "--state", str(instance.state)], check=False)
            assert shown.returncode == 1
            assert "somebody else changes the kernel rules" in shown.stdout
            repairs = sum(_metric(stage, "rules_repairs_total", cause=cause) for cause in ("table", "chain", "unseen"))
            assert eventually(lambda: TABLE in stage.node.run(["nft", "list", "tables"]).stdout, 15.0)
            for address in other.addresses:
                assert _opened(closed, address, 7) is None
        figure("a second owner of the rules", f"named after {repairs:.0f} repairs; repaired once it stops")


def _packets_from(pod: Namespace, server: Namespace) -> Callable[[], int]:
    taps = tap(server, f"ip saddr {pod.ipv4}"), tap(server, f"ip6 saddr {pod.ipv6}")
    return lambda: sum(each() for each in taps)


@contextmanager
def _rules_kept_away(stage: Stage) -> Iterator[None]:
    """Somebody deletes our table again and again, as fast as it goes."""
    stop = threading.Event()

    def fight() -> None:
        while not stop.is_set():
            stage.node.run(["nft", "delete", "table", *TABLE.split()], check=False)

    fighter = threading.Thread(target=fight)
    fighter.start()
    try:
        yield
    finally:
        stop.set()
        fighter.join()


def _opened(pod: Namespace, address: str, port: int) -> socket.socket | None:
    """A connection over which something came; None where there is none."""
    try:
        connection = pod.connect(address, port, timeout_s=0.5)
    except OSError:
        return None
    try:
        connection.sendall(b"hello")
        if connection.recv(100):
            return connection
    except OSError:
        pass
    connection.close()
    return None


def _is_dead(connection: socket.socket) -> bool:
    """Whether nothing comes any more."""
    try:
        connection.setblocking(False)
        while connection.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        pass
    except OSError:
        return True
    try:
        connection.settimeout(0.3)
        connection.sendall(b"still there?")
        return not connection.recv(100)
    except OSError:
        return True


def _metric(stage: Stage, name: str, **labels: str) -> float:
    host, _, port = METRICS.partition(":")
    with stage.node.connect(host, int(port)) as scraping:
        scraping.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(partial(scraping.recv, 65536), b"")).decode()
    said = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^pellucid_{name}{re.escape(f'{{{said}}}') if said else ''} ([0-9.e+]+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_new_address_of_the_node_is_never_dialled_for_a_pod(tmp_path: Path, figure: Figure) -> None:
    """A route of a policy leads to an address that the node gets while it runs, and loses again."""
    routed = "203.0.113.7"
    rules = (
        f"  - {{name: routed, match: {{destinations: [{{domain: {SITE}}}]}}, action: Route, "
        f"route: {{to: {{address: {routed}, port: 80}}}}}}\n  - {{match: {{}}, action: Block}}"
    )
    with Stage(tmp_path) as stage:
        a, web, node = stage["a"], stage["web"], stage.node
        web.run(["ip", "address", "add", f"{routed}/32", "dev", "lo"])
        node.run(["ip", "route", "add", routed, "via", web.ipv4, "dev", web.interface, "onlink"])
        stage.serve("web", {80: speak_http}, [routed, *web.addresses])
        stage.serve("node", {80: speak_http}, [*stage.node.addresses])
        stage.write("policy.yaml", policy(rules))
        with stage.run("--workers", "2"):
            assert get(a, web.ipv4, 80, SITE).end == "answered"
            node.run(["ip", "address", "add", f"{routed}/32", "dev", "lo"])
            began = time.monotonic()
            assert eventually(lambda: all(get(a, web.ipv4, 80, SITE).end == "reset" for _ in range(4)), 10.0)
            came = time.monotonic() - began
            node.run(["ip", "address", "del", f"{routed}/32", "dev", "lo"])
            began = time.monotonic()
            assert eventually(lambda: all(get(a, web.ipv4, 80, SITE).end == "answered" for _ in range(4)), 10.0)
            went = time.monotonic() - began
        figure(
            "an address of the node comes and goes", f"workers know after {came * 1000:.0f} ms and {went * 1000:.0f} ms"
        )
        assert max(came, went) < LIMIT_S


def test_what_is_changed_while_the_agent_is_away_is_repaired_by_the_next(tmp_path: Path, figure: Figure) -> None:
    """The chain that names the content of the table is still there."""
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", RULES)
        with stage.run("--workers", "1") as instance:
            wanted = held(stage)
            supervisor, agent = process_ids(instance)["supervisor"], process_ids(instance)["agent"]
            os.kill(supervisor, signal.SIGSTOP)  # so that the next agent does not come before
            kill(agent)
            stage.node.nft(f"flush chain {TABLE} judge\nadd element {TABLE} exclude4 {{ 192.0.2.10 }}")
            os.kill(supervisor, signal.SIGCONT)
            began = time.monotonic()
            assert eventually(lambda: held(stage) == wanted, 20.0), instance.log_end()
            took = time.monotonic() - began
        figure("drift while the agent is away", f"repaired {took * 1000:.0f} ms after the next one may start")


def test_drift_is_repaired_while_it_drains(tmp_path: Path) -> None:
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.serve("web", {443: speak_https})
        stage.write("policy.yaml", RULES)
        before = stage.left_behind()
        with stage.run("--workers", "1", drain_s=60.0) as instance:
            with TlsSession(stage["a"], stage["web"].ipv4, 443, SITE) as live:
                os.kill(process_ids(instance)["guardian"], signal.SIGTERM)
                assert eventually(
                    lambda: "chain prerouting" in held(stage)[0] and "chain judge" not in held(stage)[0], 20.0
                )
                assert live.request().end == "answered"
                drained = _chains(stage)
                stage.node.nft("flush ruleset")
                assert eventually(lambda: _chains(stage) == drained, 10.0), instance.log_end()
                assert live.request().end == "answered"
            assert instance.stop() == 0
        assert stage.left_behind() == before


def _chains(stage: Stage) -> list[str]:
    return [block for block in held(stage)[0].split("\n\n") if block.startswith("chain")]


def test_a_large_policy_is_enforced_again_as_soon_as_a_small_one(tmp_path: Path, figure: Figure) -> None:
    """Loading it takes longer: meanwhile the workers judge alone."""
    count, each = 5, 900
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.serve("web", {80: speak_http})
        a, web = stage["a"], stage["web"]
        for number in range(count):
            rules = "".join(
                f"  - {{name: r{i}, match: {{destinations: [{{cidr: 198.18.{number}.{i % 250}/32}}], ports: [{{port: {1 + i}}}]}}, "
                "action: Allow}\n"
                for i in range(each)
            )
            stage.write(f"many{number}.yaml", policy(rules, name=f"many{number}"))
        stage.write(
            "zlast.yaml",
            policy(
                f"  - {{match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}\n  - {{match: {{}}, action: Block}}",
                name="zlast",
            ),
        )
        with stage.run("--workers", "1") as instance:
            took = []
            for change in ("flush ruleset", f"flush chain {TABLE} judge", f"delete table {TABLE}"):
                repaired = _repairs(instance)
                stage.node.nft(change)
                began = time.monotonic()
                assert eventually(lambda: get(a, web.ipv4, 80, FORBIDDEN).end == "reset", 10.0)
                took.append(time.monotonic() - began)
                assert get(a, web.ipv6, 80, FORBIDDEN).end == "reset"
                assert get(a, web.ipv4, 80, SITE).end == "answered"
                assert eventually(lambda repaired=repaired: _repairs(instance) > repaired, 20.0)  # type: ignore[misc]
                assert get(a, web.ipv4, 80, FORBIDDEN).end == "reset"
        figure(
            f"drift, {count * each} rules", f"enforced again after {max(took) * 1000:.0f} ms at most, {len(took)} kinds"
        )
        assert max(took) < LIMIT_S


def _repairs(instance: Instance) -> int:
    return instance.log.read_text().count("kernel rules repaired within")
