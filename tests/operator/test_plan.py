"""From everything that is there to everything that should be: whatever the order, and whatever is bad."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pellucid_operator.daemonsets import APPLIED, SETTINGS
from pellucid_operator.judge import Unknown
from pellucid_operator.plan import Plan, plan
from pellucid_operator.world import (
    AUTHORITIES,
    CLUSTER_POLICIES,
    DAEMON_SETS,
    NAMESPACES,
    NODES,
    POLICIES,
    PROXIES,
    SNAPSHOTS,
    WATCHED,
    Key,
    Kind,
    World,
    key_of,
)
from pellucid_policy.features import ONE_NODE
from pellucid_policy.installation import SnapshotIndex
from pellucid_policy.objects import Objects
from pellucid_policy.snapshot import objects_of

NOW, LATER = "2026-01-31T12:00:00Z", "2026-01-31T13:00:00Z"
WEB: Key = ("TransparentPolicy", "shop", "web")
TEMPLATE = {
    "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "pellucid-node", "labels": {"a": "b"}},
    "spec": {
        "template": {
            "metadata": {"annotations": {"own": "x"}},
            "spec": {"containers": [{"name": "pellucid", "image": "pellucid:1"}]},
        },
    },
}  # fmt: skip
CANARY = {**copy.deepcopy(TEMPLATE), "metadata": {"name": "pellucid-canary"}}
OWNER = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "pellucid-operator", "uid": "u"}


def policy(
    name: str = "web", domain: str = "one.example", *, namespace: str = "shop", generation: int = 1, **spec: Any
) -> dict[str, Any]:
    rules = [{"match": {"destinations": [{"domain": domain}]}, "action": "Allow"}]
    metadata = {
        "name": name,
        "namespace": namespace,
        "generation": generation,
        "creationTimestamp": NOW,
        "managedFields": [{"manager": "kubectl"}],
    }
    return {
        "apiVersion": "pellucid.dev/v1alpha1", "kind": "TransparentPolicy", "metadata": metadata,
        "spec": {"podSelector": {}, "rules": rules, **spec},
    }  # fmt: skip


def to(**destination: Any) -> dict[str, Any]:
    return {"match": {"destinations": [destination]}, "action": "Allow"}


def cluster_policy(name: str, selector: dict[str, Any], generation: int = 1) -> dict[str, Any]:
    return {
        "apiVersion": "pellucid.dev/v1alpha1", "kind": "ClusterTransparentPolicy",
        "metadata": {"name": name, "generation": generation},
        "spec": {"tier": "Admin", "namespaceSelector": selector, "rules": [{"match": {}, "action": "Block"}]},
    }  # fmt: skip


def proxy(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "pellucid.dev/v1alpha1",
        "kind": "TransparentProxy",
        "metadata": {"name": "default", "generation": 1},
        "spec": spec,
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def node(name: str, revision: str, **conditions: tuple[str, str]) -> dict[str, Any]:
    told = [{"type": kind, "status": status, "message": message} for kind, (status, message) in conditions.items()]
    return {"metadata": {"name": name}, "status": {"revision": revision, "conditions": told}}


def world(*found: tuple[Kind, dict[str, Any]], **more: Any) -> World:
    objects: dict[str, dict[Key, Any]] = {kind.name: {} for kind in (*WATCHED, DAEMON_SETS)}
    for kind, body in found:
        objects[kind.name][key_of(kind.name, body)] = body
    return World(
        objects, **{"templates": {"pellucid-node": TEMPLATE, "pellucid-canary": CANARY}, "owner": OWNER, **more}
    )


def written(before: World, made: Plan) -> World:
    """The world once made is applied and heard of."""
    objects = {kind: dict(found) for kind, found in before.objects.items()}
    for each in [*made.pieces.values(), *([made.index] if made.index else [])]:
        each = json.loads(json.dumps(each))  # as the API server gives it back
        objects[SNAPSHOTS.name][key_of(SNAPSHOTS.name, each)] = each
    for each in made.daemon_sets.values():
        objects[DAEMON_SETS.name][key_of(DAEMON_SETS.name, each)] = {"metadata": each["metadata"]}
    for name in made.unwanted:
        del objects[DAEMON_SETS.name][DAEMON_SETS.name, before.namespace, name]
    for key, status in made.statuses.items():
        objects[key[0]][key] = {**objects[key[0]][key], "status": status}
    return replace(before, objects=objects, history={**before.history, made.revision: made.holds}, before=made.in_force)


def changed(before: World, kind: Kind, body: dict[str, Any]) -> World:
    """The object is there, or is another one; who edits a policy leaves its status."""
    objects = {name: dict(found) for name, found in before.objects.items()}
    key = key_of(kind.name, body)
    objects[kind.name][key] = {**({} if kind is NODES else objects[kind.name].get(key, {})), **body}
    return replace(before, objects=objects)


def offered(found: World) -> Objects:
    """What nodes are offered."""
    specs = {name: body["spec"] for (_, _, name), body in found.of(SNAPSHOTS).items()}
    index = msgspec.convert(specs["current"]["index"], SnapshotIndex)
    return objects_of(index, {name: spec["piece"]["data"] for name, spec in specs.items() if "piece" in spec}, ONE_NODE)


def condition(made: Plan, key: Key, kind: str) -> tuple[str, str, str]:
    found = next(each for each in made.statuses[key]["conditions"] if each["type"] == kind)
    return found["status"], found["reason"], found["message"]


def domains(found: World) -> dict[str, str]:
    named = {}
    for each in offered(found).policies:
        destinations = each.spec.rules[0].match.destinations
        assert isinstance(destinations, tuple)
        named[each.metadata.name] = str(destinations[0].domain)
    return named


def test_what_is_there_is_offered_and_then_there_is_nothing_more_to_do() -> None:
    before = world((POLICIES, policy()), (NAMESPACES, namespace("shop")), (PROXIES, proxy()))
    made = plan(before, NOW)
    after = written(before, made)
    assert domains(after) == {"web": "one.example"}
    assert condition(made, WEB, "Accepted")[:2] == ("True", "Accepted")
    assert condition(made, WEB, "Programmed")[:2] == ("False", "NoNodes")
    again = plan(after, LATER)
    assert (again.pieces, again.index, again.daemon_sets, again.statuses, again.needless) == ({}, None, {}, {}, ())


@pytest.mark.parametrize("seed", range(12))
def test_the_order_of_objects_makes_no_difference(seed: int) -> None:
    bodies = [
        *((POLICIES, policy(f"p{n}", f"d{n % 3}.example", namespace=f"n{n % 4}")) for n in range(20)),
        *((CLUSTER_POLICIES, cluster_policy(f"c{n}", {"matchLabels": {"team": str(n)}})) for n in range(3)),
        *((NAMESPACES, namespace(f"n{n}", team=str(n % 2))) for n in range(6)),
        (POLICIES, policy("bad", podSelector=None)), (PROXIES, proxy(workers=2)), (NODES, node("n1", "r0")),
    ]  # fmt: skip
    first = plan(world(*bodies), NOW)
    random.Random(seed).shuffle(bodies)
    assert plan(world(*bodies), NOW) == first


@pytest.mark.parametrize("seed", range(6))
def test_however_it_came_there_the_same_objects_are_offered_the_same(seed: int) -> None:
    """Edits, restarts that forget what was offered, and plans at any moment: what is offered in the end follows from the objects alone."""
    chance = random.Random(seed)
    now = world((PROXIES, proxy()))
    for _ in range(40):
        number = chance.randrange(8)
        now = changed(now, POLICIES, policy(f"p{number}", f"d{chance.randrange(5)}.example"))
        if chance.random() < 0.2:
            objects = {name: dict(found) for name, found in now.objects.items()}
            objects[POLICIES.name].pop(("TransparentPolicy", "shop", f"p{chance.randrange(8)}"), None)
            now = replace(now, objects=objects)
        if chance.random() < 0.6:
            now = written(now, plan(now, NOW))
        if chance.random() < 0.1:
            now = replace(now, history={}, before=None)
    now = written(now, plan(now, NOW))
    fresh = world((PROXIES, proxy()), *((POLICIES, dict(body)) for body in now.of(POLICIES).values()))
    assert plan(fresh, NOW).revision == plan(now, NOW).revision
    assert offered(now).policies == offered(written(fresh, plan(fresh, NOW))).policies


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (policy(rules=[to(cidr="10.0.0.1/8")]), "Invalid", "spec.rules[0].match.destinations[0].cidr"),
        (policy(unknownField=1), "Invalid", "spec.unknownField: is an unknown field"),
        (policy(rules=[to(service={"name": "a", "namespace": "b"})]), "UnsupportedFeature", "needs feature Services"),
    ],
)  # fmt: skip
def test_a_bad_edit_leaves_the_last_accepted_version_in_force_and_others_go_on(
    bad: dict[str, Any], reason: str, message: str
) -> None:
    good = world((POLICIES, policy()), (POLICIES, policy("other")))
    good = written(good, plan(good, NOW))
    edited = changed(changed(good, POLICIES, bad), POLICIES, policy("other", "new.example"))
    made = plan(edited, LATER)
    after = written(edited, made)
    assert domains(after) == {"web": "one.example", "other": "new.example"}
    status, told, words = condition(made, WEB, "Accepted")
    assert (status, told) == ("False", reason)
    assert message in words
    assert "last accepted version stays in force" in words
    restarted = replace(after, history={}, before=None)
    assert domains(written(restarted, plan(restarted, LATER))) == domains(after), (
        "also for an operator that starts again"
    )
    assert set(made.warnings) == {WEB}


def test_what_is_in_force_is_never_guessed() -> None:
    """A piece of the snapshot that is not there (yet): an operator that starts must not take what it held for nothing."""
    good = world((POLICIES, policy()))
    good = written(good, plan(good, NOW))
    bad = changed(good, POLICIES, policy(unknownField=1))
    objects = {name: dict(found) for name, found in bad.objects.items()}
    (piece,) = (key for key in objects[SNAPSHOTS.name] if key[2] != "current")
    del objects[SNAPSHOTS.name][piece]
    with pytest.raises(Unknown, match="is not there"):
        plan(replace(bad, objects=objects, before=None), NOW)
    made = plan(replace(bad, objects=objects), NOW)  # who remembers mends it
    assert set(made.pieces) == {piece[2]}
    assert made.index is None


def test_a_piece_that_somebody_changed_is_written_again() -> None:
    good = world((POLICIES, policy()))
    good = written(good, plan(good, NOW))
    objects = {name: dict(found) for name, found in good.objects.items()}
    (piece,) = (key for key in objects[SNAPSHOTS.name] if key[2] != "current")
    objects[SNAPSHOTS.name][piece] = {**objects[SNAPSHOTS.name][piece], "spec": {"piece": {"data": "AAAA"}}}
    assert set(plan(replace(good, objects=objects), NOW).pieces) == {piece[2]}


def test_a_node_that_refuses_is_warned_of() -> None:
    body = node("n1", "old")
    body["status"]["conditions"] = [
        {"type": "Programmed", "status": "False", "reason": "Refused", "message": "needs feature X"}
    ]
    assert plan(world((NODES, body)), NOW).warnings == {("TransparentNode", "", "n1"): "needs feature X"}


def test_a_policy_that_was_bad_from_the_start_is_not_there_for_nodes() -> None:
    before = world((POLICIES, policy(unknownField=1)))
    made = plan(before, NOW)
    assert offered(written(before, made)).policies == ()
    assert condition(made, WEB, "Programmed")[:2] == ("False", "NotAccepted")
    assert "nothing of it is in force" in condition(made, WEB, "Accepted")[2]


def test_a_deleted_policy_goes_also_if_it_was_bad() -> None:
    good = world((POLICIES, policy()))
    good = written(good, plan(good, NOW))
    bad = changed(good, POLICIES, policy(unknownField=1))
    bad = written(bad, plan(bad, NOW))
    objects = {name: dict(found) for name, found in bad.objects.items()}
    del objects[POLICIES.name][WEB]
    gone = replace(bad, objects=objects)
    assert offered(written(gone, plan(gone, NOW))).policies == ()


def test_a_selector_of_namespaces_is_resolved_and_follows_their_labels() -> None:
    before = world(
        (CLUSTER_POLICIES, cluster_policy("c", {"matchLabels": {"team": "red"}})),
        (NAMESPACES, namespace("a", team="red")),
        (NAMESPACES, namespace("b")),
    )
    first = plan(before, NOW)
    after = written(before, first)
    second = plan(changed(after, NAMESPACES, namespace("b", team="red")), NOW)
    assert first.revision != second.revision
    third = plan(changed(after, NAMESPACES, namespace("b", other="x")), NOW)
    assert third.index is None, "labels that nobody asks for change nothing"


def test_an_authority_needs_a_feature_that_this_release_lacks() -> None:
    body = {
        "apiVersion": "pellucid.dev/v1alpha1", "kind": "InterceptionAuthority", "metadata": {"name": "ca", "generation": 1},
        "spec": {"names": ["a.example"], "namespaces": {}, "key": {"secretRef": {"name": "ca"}}},
    }  # fmt: skip
    made = plan(world((AUTHORITIES, body)), NOW)
    assert condition(made, ("InterceptionAuthority", "", "ca"), "Accepted")[:2] == ("False", "UnsupportedFeature")


# Statuses


def test_programmed_is_what_all_nodes_say_of_this_version() -> None:
    before = world((POLICIES, policy()), (POLICIES, policy("other")))
    made = plan(before, NOW)
    old = made.revision
    now = written(before, made)
    now = changed(changed(now, NODES, node("n1", old)), NODES, node("n2", ""))
    told = plan(now, NOW)
    assert told.statuses[WEB]["nodes"] == {"desired": 2, "programmed": 1, "summary": "1/2"}
    assert condition(told, WEB, "Programmed") == ("False", "Pending", "not on n2")
    now = changed(written(now, told), NODES, node("n2", old))
    told = plan(now, NOW)
    assert condition(told, WEB, "Programmed")[:2] == ("True", "Programmed")
    # Another policy's edit: this one's version is in the revision before, too
    edited = changed(written(now, told), POLICIES, policy("other", "new.example", generation=2))
    after = plan(edited, LATER)
    assert after.revision != old
    assert WEB not in after.statuses, "nothing to write: its version is enforced everywhere"
    assert condition(after, ("TransparentPolicy", "shop", "other"), "Programmed")[1] == "Pending"


def test_nodes_that_cannot_are_named_with_their_own_words_ten_at_most() -> None:
    nodes = [(NODES, node(f"n{n:02}", "old", Programmed=("False", "needs feature X"))) for n in range(14)]
    told = condition(plan(world((POLICIES, policy()), *nodes), NOW), WEB, "Programmed")
    assert told[1] == "NodesFailed"
    assert told[2].count("needs feature X") == 10
    assert told[2].endswith("and 4 more")


def test_a_condition_keeps_its_time_while_it_stays() -> None:
    before = world((POLICIES, policy()))
    after = written(before, plan(before, NOW))
    told = plan(changed(after, NODES, node("n1", plan(after, NOW).revision)), LATER)
    times = {each["type"]: each["lastTransitionTime"] for each in told.statuses[WEB]["conditions"]}
    assert times == {"Accepted": NOW, "Programmed": LATER}


def test_the_installation_tells_of_canaries() -> None:
    key: Key = ("TransparentProxy", "", "default")
    silent = world((PROXIES, proxy()), (NODES, node("n1", "", InterceptionVerified=("False", "no canary"))))
    assert condition(plan(silent, NOW), key, "InterceptionVerified") == ("False", "NodesFailed", "not on n1")
    well = world((PROXIES, proxy()), (NODES, node("n1", "", InterceptionVerified=("True", ""))))
    assert condition(plan(well, NOW), key, "InterceptionVerified")[0] == "True"


# DaemonSets


def test_templates_get_placement_image_owner_and_a_digest_of_settings() -> None:
    made = plan(
        world((PROXIES, proxy(nodeSelector={"role": "edge"}, images={"proxy": "pellucid:2"}))), NOW
    ).daemon_sets["pellucid-node"]
    pod = made["spec"]["template"]
    assert pod["spec"]["nodeSelector"] == {"role": "edge"}
    assert pod["spec"]["containers"][0]["image"] == "pellucid:2"
    assert made["metadata"]["ownerReferences"] == [OWNER]
    assert made["metadata"]["namespace"] == "pellucid-system"
    assert {"own", SETTINGS} == set(pod["metadata"]["annotations"])
    assert "nodeSelector" not in TEMPLATE["spec"]["template"]["spec"], "the template stays as it is"  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "rolls"),
    [
        ({"workers": 2}, True),
        ({"podCIDRs": ["10.0.0.0/8"]}, True),
        ({"sourceAddress": "Node"}, True),
        ({"limits": {"connections": 9}}, True),
        ({"defaultAction": "Block"}, False), ({}, False),
    ],
)  # fmt: skip
def test_only_settings_that_a_node_cannot_change_roll_its_pods(spec: dict[str, Any], rolls: bool) -> None:
    before = world((PROXIES, proxy()), (POLICIES, policy()))
    after = written(before, plan(before, NOW))
    found = plan(changed(after, PROXIES, proxy(**spec)), NOW).daemon_sets
    assert set(found) == ({"pellucid-node"} if rolls else set()), "and the canary never"


def test_without_a_transparent_proxy_there_is_no_daemon_set_but_policies_are_offered() -> None:
    before = world((PROXIES, proxy()), (POLICIES, policy()))
    after = written(before, plan(before, NOW))
    objects = {name: dict(found) for name, found in after.objects.items()} | {PROXIES.name: {}}
    foreign = {"metadata": {"name": "somebody-elses", "namespace": "pellucid-system"}}
    objects[DAEMON_SETS.name][DAEMON_SETS.name, "pellucid-system", "somebody-elses"] = foreign
    made = plan(replace(after, objects=objects), NOW)
    assert made.unwanted == ("pellucid-canary", "pellucid-node")
    assert domains(after) == {"web": "one.example"}


def test_a_bad_transparent_proxy_changes_no_daemon_set() -> None:
    before = world((PROXIES, proxy(nodeSelector={"role": "edge"})))
    after = written(before, plan(before, NOW))
    made = plan(changed(after, PROXIES, proxy(podCIDRs=["10.0.0.1/8"])), NOW)
    assert (made.daemon_sets, made.unwanted) == ({}, ())
    assert condition(made, ("TransparentProxy", "", "default"), "Accepted")[0] == "False"


def test_the_transparent_proxy_of_the_chart_is_made_once_and_is_then_the_users() -> None:
    wanted = {**proxy(workers=2), "metadata": {"name": "default"}}
    before = world(proxy=wanted)
    made = plan(before, NOW).proxy
    assert made is not None
    assert (made["spec"], made["metadata"]["name"]) == ({"workers": 2}, "default")
    after = changed(before, PROXIES, {**made, "spec": {"workers": 2, "sourceAddress": "Node"}})
    assert plan(after, NOW).proxy is None, "a field that a user has added is no drift"
    newer = plan(replace(after, proxy={**wanted, "spec": {"workers": 3}}), NOW).proxy
    assert newer is not None
    assert newer["spec"] == {"workers": 3}


def test_a_daemon_set_of_another_chart_version_is_applied_anew() -> None:
    before = world((PROXIES, proxy()))
    after = written(before, plan(before, NOW))
    newer = {
        "pellucid-node": {**TEMPLATE, "metadata": {"name": "pellucid-node", "labels": {"version": "2"}}},
        "pellucid-canary": CANARY,
    }
    made = plan(replace(after, templates=newer), NOW)
    assert set(made.daemon_sets) == {"pellucid-node"}
    assert made.daemon_sets["pellucid-node"]["metadata"]["annotations"][APPLIED]
