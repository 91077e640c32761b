"""What the demo tries, and what must come of it: at the client, at the servers, and in the flow records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .clients import Answer, get, get_several, get_tls, greet
from .scene import METADATA, PODS, Scene
from .servers import Arrival


@dataclass(frozen=True)
class Seen:
    """A connection as a server must see it. source: an address; requests: how many came over it."""

    server: str
    source: str
    name: str | None
    requests: int = 1

    def __str__(self) -> str:
        several = f", {self.requests} requests" if self.requests > 1 else ""
        return f"{self.server}: {self.name or 'no name'} from {self.source}{several}"


@dataclass(frozen=True)
class Recorded:
    """A flow record: verdict and rule (None for the default action or no policy), and the verdict of an audited rule."""

    pod: str
    verdict: str
    rule: str | None
    name: str | None
    would: str | None = None


@dataclass(frozen=True)
class Trial:
    """ends: how each request must end for the client (clients.Answer.end); seen: what servers must see; record: what must be
    written, None where the kernel alone decides. without_proxy: ends and seen where nothing stands in the way."""

    pod: str
    does: str
    act: Callable[[Scene], list[Answer]]
    because: str
    ends: tuple[str, ...]
    seen: tuple[Seen, ...]
    record: Recorded | None
    without_proxy: tuple[Seen, ...]


def seen_by(arrivals: Iterable[Arrival]) -> tuple[Seen, ...]:
    """What the servers' journal says, in the form of an expectation."""
    return tuple(
        Seen(each.server, each.source, each.name, len(each.requests) if each.protocol != "smtp" else 1)
        for each in arrivals
    )


def recorded_in(flows: Path) -> Counter[Recorded]:
    """How often each record stands in the flow file; half a line at its end is not one yet."""
    found: Counter[Recorded] = Counter()
    for line in flows.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        flow = json.loads(line)
        rule = flow["policy"] and flow["policy"]["rule"]
        would = flow.get("audit", {}).get("verdict")
        found[Recorded(flow["source"]["pod"], flow["verdict"], rule, flow["destination"]["name"], would)] += 1
    return found


SITE, BETA, TRACKER, ADS = "www.example.com", "beta.example.com", "cdn.tracker.example", "ads.example"


def all_trials() -> list[Trial]:
    """The trials of the policy in lab/policy, in order."""
    return [
        _https("cart", SITE, "own-sites"),
        _http("cart", SITE, "own-sites"),
        _https("cart", SITE, "own-sites", ipv6=True),
        _https("cart", TRACKER, "no-trackers", end="reset"),
        _https("cart", TRACKER, "no-trackers", end="reset", ipv6=True),
        _http("cart", ADS, "no-ads", end="forbidden"),
        _https("cart", BETA, "to-canary", at="canary", verdict="Route"),
        _two_names(),
        _mail(),
        _https("cart", None, "rest", end="reset"),
        _metadata(),
        _https("trial", TRACKER, None, would="Block"),
        _https("free", TRACKER, None, direct=True),
    ]


def _source(pod: str, ipv6: bool = False) -> str:
    return PODS[pod][ipv6]


def _https(
    pod: str,
    name: str | None,
    rule: str | None,
    *,
    end: str = "answered",
    at: str = "web",
    verdict: str = "",
    would: str | None = None,
    ipv6: bool = False,
    direct: bool = False,
) -> Trial:
    def act(scene: Scene) -> list[Answer]:
        web = scene.server("web")
        return [get_tls(scene.pod(pod), web.ipv6 if ipv6 else web.ipv4, 443, name)]

    source = _source(pod, ipv6)
    verdict = verdict or ("Allow" if end == "answered" else "Block")
    return Trial(
        pod,
        f"HTTPS {name or 'without a name'}" + (", IPv6" if ipv6 else ""),
        act,
        _because(verdict, rule, would, direct),
        (end,),
        (Seen(at, source, name),) if end == "answered" else (),
        None if direct else Recorded(pod, verdict, rule, name, would),
        (Seen("web", source, name),),
    )


def _http(pod: str, name: str, rule: str, *, end: str = "answered") -> Trial:
    verdict = "Allow" if end == "answered" else "Block"
    arrives = (Seen("web", _source(pod), name),)
    return Trial(
        pod,
        f"HTTP {name}",
        lambda scene: [get(scene.pod(pod), scene.server("web").ipv4, 80, name)],
        _because(verdict, rule),
        (end,),
        arrives if end == "answered" else (),
        Recorded(pod, verdict, rule, name),
        arrives,
    )


def _two_names() -> Trial:
    return Trial(
        "cart",
        f"HTTP {SITE}, then {ADS} on the same connection",
        lambda scene: get_several(scene.pod("cart"), scene.server("web").ipv4, 80, [SITE, ADS]),
        "Allow by own-sites, then Block by no-ads",
        # No 403 to a later request: answers to earlier ones may still be on their way, and it could be taken for one of them.
        ("answered", "reset"),
        (Seen("web", _source("cart"), SITE),),
        Recorded("cart", "Block", "no-ads", ADS),
        (Seen("web", _source("cart"), ADS, 2),),
    )


def _mail() -> Trial:
    arrives = (Seen("mail", _source("cart"), None),)
    return Trial(
        "cart",
        "SMTP, where the server speaks first",
        lambda scene: [greet(scene.pod("cart"), scene.server("mail").ipv4, 25)],
        "Allow by mail",
        ("answered",),
        arrives,
        Recorded("cart", "Allow", "mail", None),
        arrives,
    )


def _metadata() -> Trial:
    return Trial(
        "cart",
        "HTTP to the cloud metadata address",
        lambda scene: [get(scene.pod("cart"), METADATA, 80, METADATA)],
        "Block by no-metadata, in the kernel",
        ("refused",),
        (),
        None,
        (Seen("meta", _source("cart"), METADATA),),
    )


def _because(verdict: str, rule: str | None, would: str | None = None, direct: bool = False) -> str:
    if direct:
        return "no policy selects the pod: past the proxy"
    if would:
        return f"Audit: recorded as {would}, let pass"
    return f"{verdict} by {rule}"
