"""compile: who is in which group, what the kernel is given, and what it costs."""

from __future__ import annotations

import ipaddress
import time
from itertools import pairwise
from random import Random

import pytest

from pellucid_policy import kernel_rules
from pellucid_policy.compile import PolicySet, compile_policies, decode, encode
from pellucid_policy.decide import decide
from pellucid_policy.facts import ABSENT, TCP, Facts
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.plan import AddressRule
from pellucid_policy.verdict import Verdict

from . import generate
from .algebra import kernel_difference

HEAD = "apiVersion: pellucid.dev/v1alpha1\n"
PODS = """
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, uid: u1, labels: {app: api}}
spec: {serviceAccountName: api, nodeName: node1}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop, labels: {app: api}}
spec: {hostNetwork: true}
status: {podIP: 192.0.2.1}
---
apiVersion: v1
kind: Pod
metadata: {name: ended, namespace: shop, labels: {app: api}}
status: {phase: Succeeded, podIP: 10.0.0.3}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: x}}
"""


def policy(spec: str, name: str = "p", rules: str = "[{match: {}, action: Allow}]", namespace: str = "shop") -> str:
    return f"---\n{HEAD}kind: TransparentPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  rules: {rules}\n  {spec}\n"


def cluster(spec: str, name: str = "c", rules: str = "[{match: {}, action: Allow}]", tier: str = "Admin") -> str:
    return f"---\n{HEAD}kind: ClusterTransparentPolicy\nmetadata: {{name: {name}}}\nspec:\n  tier: {tier}\n  rules: {rules}\n  {spec}\n"


def compiled(text: str, **options: str) -> PolicySet:
    objects = parse_files({"a.yaml": text.encode()})
    assert isinstance(objects, Objects), [str(each) for each in objects]
    return compile_policies(objects, **options)


@pytest.mark.parametrize(("text", "selected"), [
    (policy("podSelector: {}"), {"api", "other", "ended"}),
    (policy("podSelector: {matchLabels: {app: api}}"), {"api", "ended"}),
    (policy("podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}"), {"other"}),
    (policy("podSelector: {}", namespace="default"), {"stranger"}),
    (cluster("podSelector: {}"), {"api", "other", "ended", "stranger"}),
    (cluster("namespaceSelector: {matchLabels: {team: x}}"), {"api", "other", "ended"}),
    (cluster("namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}"), {"stranger"}),
    (cluster("namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: default}}"), {"stranger"}),
    (cluster("serviceAccounts: [{namespace: shop, name: api}]"), {"api"}),
    (cluster("serviceAccounts: [{namespace: default, name: default}]"), {"stranger"}),
    (cluster("serviceAccounts: [{namespace: shop, name: default}]\n  podSelector: {matchLabels: {app: api}}"), {"ended"}),
    (cluster("serviceAccounts: [{namespace: default, name: api}]"), set()),
])  # fmt: skip
def test_selectors_choose_pods(text: str, selected: set[str]) -> None:
    policies = compiled(PODS + text)
    found = {pod.name for pod in policies.pods if pod.group is not None} | (
        {"stranger"} if policies.strangers is not None else set()
    )
    assert found == selected


def test_host_network_pods_are_left_out_and_ended_pods_have_no_address() -> None:
    assert {pod.name: len(pod.addresses) for pod in compiled(PODS).pods} == {"api": 2, "other": 1, "ended": 0}


def test_a_pod_is_named_as_records_need_it() -> None:
    pod = compiled(PODS).pods[0]
    assert (pod.namespace, pod.name, pod.uid, pod.service_account, pod.node) == ("shop", "api", "u1", "api", "node1")


def test_policies_stand_in_order_of_tier_priority_age_and_name() -> None:
    text = (
        cluster("podSelector: {}", "base", tier="Baseline") + cluster("podSelector: {}", "admin")
        + policy("podSelector: {}", "c") + policy("podSelector: {}", "b")
        + policy("podSelector: {}", "z").replace("name: z,", 'name: z, creationTimestamp: "2026-01-01T00:00:00Z",')
        + policy("podSelector: {}\n  priority: 1", "w")
    )  # fmt: skip
    assert [key.name for key in compiled(PODS + text).groups[0].policies] == ["admin", "w", "z", "b", "c", "base"]


def test_the_default_action_is_the_argument_or_the_installations() -> None:
    proxy = f"---\n{HEAD}kind: TransparentProxy\nmetadata: {{name: default}}\nspec: {{defaultAction: Block}}\n"
    text = PODS + policy("podSelector: {}", rules="[{match: {ports: [{port: 1}]}, action: Allow}]")
    said = [compiled(*given[:1], **given[1]).groups[0].enforced.default.action for given in (
        (text, {}), (text + proxy, {}), (text + proxy, {"default_action": "Allow"}), (text, {"default_action": "Block"}),
    )]  # fmt: skip
    assert said == ["Allow", "Block", "Allow", "Block"]


@pytest.mark.parametrize("rules", [
    "[{match: {destinations: [{service: {name: a, namespace: b}}]}, action: Block}]",
    "[{match: {}, action: Route, route: {to: {service: {name: a, namespace: b, port: 1}}}}]",
])  # fmt: skip
def test_what_cannot_be_compiled_is_an_error_and_not_left_out(rules: str) -> None:
    with pytest.raises(ValueError, match="needs feature Services"):
        compiled(PODS + policy("podSelector: {}", rules=rules))


def test_a_default_action_is_allow_or_block() -> None:
    with pytest.raises(ValueError, match="'Pass' is neither Allow nor Block"):
        compiled(PODS, default_action="Pass")


def leading(rules: str, spec: str = "podSelector: {}") -> list[str]:
    return [_line(each) for each in compiled(PODS + policy(spec, rules=rules)).groups[0].kernel.leading]


def nameless(text: str) -> list[str]:
    return [_line(each) for each in compiled(PODS + text).groups[0].kernel.nameless]


def _line(rule: AddressRule) -> str:
    ports = "any" if rule.ports is None else ",".join(f"{p.protocol}:{p.first}-{p.last}" for p in rule.ports)
    networks = "any" if rule.networks is None else ",".join(rule.networks)
    verdict = "allow" if rule.allow else str(rule.response).lower()
    return f"{verdict} {networks} {ports}" + ("" if rule.reason == "RuleMatched" else f" {rule.reason}")


FIRST = "{match: {destinations: [{cidr: 192.0.2.0/24}], ports: [{port: 80}]}, action: Allow}"
LAST = "{match: {destinations: [{cidr: 198.51.100.0/24}]}, action: Block, block: {response: Drop}}"
DEFAULT = "allow any any DefaultAction"
NAMED = "[{match: {destinations: [{domain: a.example}]}, action: Allow}]"
API = "podSelector: {matchLabels: {app: api}}"


@pytest.mark.parametrize("stops", [
    "{match: {destinations: [{domain: example.com}]}, action: Block}",
    "{match: {destinations: [{cidr: 10.0.0.0/8}, {domain: example.com}]}, action: Block}",
    "{match: {}, action: Route, route: {to: {address: 192.0.2.1, port: 1}}}",
    "{match: {}, action: Pass}",
    "{match: {}, action: Block, mode: Audit}",
    "{match: {}, action: Block, block: {response: Respond}}",
    "{match: {destinations: [{cidr: 10.0.0.0/8}]}, action: Allow, egress: {sourceAddress: Node}}",
])  # fmt: skip
def test_the_kernel_leads_up_to_the_first_rule_that_needs_the_proxy(stops: str) -> None:
    assert leading(f"[{FIRST}, {stops}, {LAST}]") == ["allow 192.0.2.0/24 6:80-80"]


@pytest.mark.parametrize("skipped", [
    "{match: {ports: [{port: 53, protocol: UDP}]}, action: Pass}",
    "{match: {ports: [{protocol: ICMP}]}, action: Block, mode: Audit}",
])  # fmt: skip
def test_a_rule_without_tcp_does_not_end_the_leading_rules(skipped: str) -> None:
    assert leading(f"[{FIRST}, {skipped}, {LAST}]") == [
        "allow 192.0.2.0/24 6:80-80",
        "drop 198.51.100.0/24 any",
        DEFAULT,
    ]


def test_nameless_is_the_whole_order_without_names() -> None:
    rules = """
  - {match: {destinations: [{domain: example.com}], ports: [{port: 443}]}, action: Allow}
  - match:
      destinations: [{cidr: 192.0.2.0/25}, {cidr: 192.0.2.128/25}]
      ports: [{port: 80}, {port: 81}, {port: 53, protocol: UDP}]
    action: Allow
  - {match: {destinations: [{cidr: 10.0.0.0/8}]}, action: Route, route: {to: {address: 192.0.2.1, port: 1}}}
  - {match: {destinations: [{cidr: 10.0.0.0/8}]}, action: Block, mode: Audit}
  - {match: {destinations: [{cidr: 11.0.0.0/8}]}, action: Block, block: {response: Respond}}"""
    common = [
        "allow 192.0.2.0/24 6:80-81,17:53-53",
        "reset 10.0.0.0/8 any NotRoutable",
        "reset 11.0.0.0/8 any",
        DEFAULT,
    ]
    assert nameless(policy("podSelector: {}", rules=rules)) == common
    assert nameless(policy("podSelector: {}\n  names: {missingSNI: Block}", rules=rules)) == [
        "reset any 6:443-443 NameMissing",
        *common,
    ]


def test_pass_goes_on_with_the_later_tiers_within_what_it_matched() -> None:
    admin = "[{match: {destinations: [{cidr: 10.0.0.0/8}], ports: [{port: 80, endPort: 90}]}, action: Pass}, {match: {}, action: Block}]"
    own = """
  - {match: {destinations: [{cidr: 10.1.0.0/16}, {cidr: 192.0.2.0/24}]}, action: Allow}
  - {match: {ports: [{port: 90, endPort: 99}]}, action: Block, block: {response: Drop}}
  - {match: {ports: [{port: 99}]}, action: Allow}"""
    assert nameless(cluster(API, rules=admin) + policy(API, rules=own)) == [
        "allow 10.1.0.0/16 6:80-90", "drop 10.0.0.0/8 6:90-90", "allow 10.0.0.0/8 6:80-90 DefaultAction", "reset any any",
    ]  # fmt: skip


def test_too_many_passes_block_and_do_not_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rules, "MAX_NAMELESS", 2)
    admin = "[{match: {destinations: [{cidr: 10.0.0.0/8}]}, action: Pass}]"
    own = f"[{FIRST}, {LAST}]"
    assert nameless(cluster(API, rules=admin) + policy(API, rules=own))[0] == "reset 10.0.0.0/8 any NotRoutable"


@pytest.mark.parametrize(("spec", "rules", "closed", "quic"), [
    ("podSelector: {}", "[{match: {}, action: Allow}]", True, False),
    ("podSelector: {}\n  failureMode: Open", NAMED, False, True),
    ("podSelector: {}\n  names: {quic: Continue}", NAMED, True, False),
    ("podSelector: {}\n  names: {quic: Reject}", "[{match: {}, action: Allow}]", True, True),
    ("podSelector: {}\n  mode: Audit\n  names: {quic: Reject}", NAMED, False, False),
    ("podSelector: {}", NAMED.replace("Allow}]", "Allow, mode: Audit}, {match: {}, action: Allow}]"), True, False),
])  # fmt: skip
def test_failure_mode_and_quic_follow_rules_that_act(spec: str, rules: str, closed: bool, quic: bool) -> None:
    kernel = compiled(PODS + policy(spec, rules=rules)).groups[0].kernel
    assert (kernel.closed, kernel.reject_quic) == (closed, quic)


def test_what_the_kernel_decides_is_what_decide_says() -> None:
    for seed in range(60):
        random = Random(seed)
        for group in compile_policies(generate.objects(random)).groups:
            for _ in range(20):
                assert kernel_difference(group, generate.facts(random)) == ""


def many_rules(count: int) -> bytes:
    """A folder of count rules, each an address and a name of its own, in policies of 1,000."""
    out = []
    for at in range(0, count, 1000):
        rules = "".join(
            "  - match:\n"
            f"      destinations: [{{domain: h{n}.example.com}}, {{cidr: 10.{n >> 8 & 255}.{n & 255}.0/24}}]\n"
            "      ports: [{port: 443}]\n"
            "    action: Block\n"
            for n in range(at, min(count, at + 1000))
        )
        out.append(
            f"{HEAD}kind: TransparentPolicy\nmetadata: {{name: p{at}}}\nspec:\n  podSelector: {{}}\n  rules:\n{rules}"
        )
    return "---\n".join(out).encode()


def test_ten_thousand_rules_are_compiled_in_seconds_and_decoded_in_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    took = [time.perf_counter()]
    objects = parse_files({"a.yaml": many_rules(10_000)})
    took.append(time.perf_counter())
    assert isinstance(objects, Objects)
    policies = compile_policies(objects)
    took.append(time.perf_counter())
    data = encode(policies)
    took.append(time.perf_counter())
    again = decode(data)
    took.append(time.perf_counter())
    assert again == policies
    parse_s, compile_s, encode_s, decode_s = (after - before for before, after in pairwise(took))
    with capsys.disabled():
        print(
            f"\n10,000 rules: parse {parse_s:.2f} s, compile {compile_s:.2f} s, encode {encode_s * 1e3:.0f} ms, "
            f"decode {decode_s * 1e3:.0f} ms, {len(data) / 1e6:.1f} MB"
        )
    assert parse_s + compile_s < 30
    assert decode_s < 1, "a tenth of a second on an idle machine; ten times that is a mistake"


def test_a_decision_costs_the_same_for_ten_rules_and_ten_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    per_decision = {}
    for count in (10, 1_000, 10_000):
        objects = parse_files({"a.yaml": many_rules(count)})
        assert isinstance(objects, Objects)
        program = compile_policies(objects).groups[0].enforced
        facts = Facts(ipaddress.ip_address("192.0.2.1").packed, 443, TCP, f"h{count - 1}.example.com")
        last = decide(program, facts)
        assert isinstance(last, Verdict)
        assert last.reason == "RuleMatched"
        assert decide(program, Facts(facts.address, 443, TCP, ABSENT)) is program.default
        per_decision[count] = min(_seconds(program, facts) for _ in range(15)) / 1000
    with capsys.disabled():
        print(
            "\na decision by exact name: "
            + ", ".join(f"{took * 1e6:.2f} µs of {count} rules" for count, took in per_decision.items())
        )
    assert per_decision[10_000] < 3 * per_decision[10]


def _seconds(program: object, facts: Facts) -> float:
    began = time.perf_counter()
    for _ in range(1000):
        decide(program, facts)  # type: ignore[arg-type]
    return time.perf_counter() - began
