"""`make demo`: pods, a node and servers in namespaces; a policy at work, changed under traffic; what happened, as the servers saw it.

Leaves nothing behind and touches nothing of the machine. Exit status: 0 all as expected, 1 something differs, 2 no namespaces here.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from .lab.clients import TlsSession, Traffic, get_tls
from .lab.edit import LIMIT_S, Edit, arrivals_agree, edit_under, replace_text
from .lab.instance import Instance, NotReady
from .lab.sandbox import SandboxError, enter
from .lab.scene import POLICY, Scene
from .lab.trials import SITE, Recorded, Seen, Trial, all_trials, recorded_in, seen_by
from .paper import Paper

ARRIVE_S = 2.0  # for what must come
QUIET_S = 0.3  # for what must not


Expected = tuple[tuple[str, ...], tuple[Seen, ...]]
"""How a trial must end for the client, and what servers must see."""


@dataclass(frozen=True)
class Outcome:
    """A trial and what came of it."""

    trial: Trial
    ends: tuple[str, ...]
    texts: tuple[str, ...]
    seen: tuple[Seen, ...]
    good: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--without-proxy", is_flag=True, help="Show the same traffic with nothing in its way, to compare.")
@click.option(
    "--policy",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=POLICY,
    show_default="examples/demo",
    metavar="DIR",
    help="Hold this folder against what the demo expects.",
)
def main(without_proxy: bool, policy: Path) -> None:
    """Show Pellucid at work in network namespaces, and check every outcome at the servers."""
    try:
        enter()
    except SandboxError as err:
        click.echo(f"Error: {err}", err=True)
        sys.exit(2)
    paper = Paper()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pellucid-demo-") as folder, Scene() as scene:
        paper.line(f"Three pods, a node and four servers stand after {time.monotonic() - begun:.1f} s.")
        try:
            good = _bare(scene, paper) if without_proxy else _with_proxy(scene, policy, Path(folder), paper)
        except NotReady as err:
            paper.bad(str(err))
            good = False
    paper.verdict(good, f"after {time.monotonic() - begun:.1f} s")
    sys.exit(0 if good else 1)


def _bare(scene: Scene, paper: Paper) -> bool:
    paper.heading("No proxy: everything arrives where it was sent")
    return _try_all(scene, paper, lambda trial: (("answered",) * len(trial.ends), trial.without_proxy), policy=False)


def _with_proxy(scene: Scene, manifests: Path, folder: Path, paper: Paper) -> bool:
    policy = Path(shutil.copytree(manifests, folder / "policy"))
    with Instance(scene.topology.node, policy, folder) as instance:
        paper.heading("The policy at work")
        checks = [
            _try_all(scene, paper, lambda trial: (trial.ends, trial.seen), policy=True),
            _records(instance, paper),
            _edits(scene, policy / "cart.yaml", paper),
        ]
        paper.heading("Stopped")
        checks.append(_stopped(scene, instance, paper))
    return all(checks)


def _try_all(scene: Scene, paper: Paper, expected: Callable[[Trial], Expected], *, policy: bool) -> bool:
    outcomes = [_try(scene, trial, *expected(trial)) for trial in all_trials()]
    quiet_from = len(scene.journal)
    late = scene.journal.wait(bool, QUIET_S, quiet_from)
    paper.table(
        ("pod", "does", "because", "the client", "the servers saw", ""),
        [_row(each, each.trial.because if policy else "no proxy") for each in outcomes],
    )
    for outcome in outcomes:
        if not outcome.good:
            wanted_ends, wanted = expected(outcome.trial)
            paper.bad(
                f"{outcome.trial.pod}, {outcome.trial.does}: expected {_ends(wanted_ends)} and {_all(wanted)}; "
                f"came {_ends(outcome.ends)} ({'; '.join(outcome.texts)}) and {_all(outcome.seen)}"
            )
    if late:
        paper.bad(f"something reached a server late: {_all(seen_by(scene.journal.arrivals(quiet_from)))}")
    return not late and all(outcome.good for outcome in outcomes)


def _try(scene: Scene, trial: Trial, ends: tuple[str, ...], seen: tuple[Seen, ...]) -> Outcome:
    begin = len(scene.journal)
    answers = trial.act(scene)
    scene.journal.wait_ended(ARRIVE_S, begin, len(seen))
    came = seen_by(scene.journal.arrivals(begin))
    got = tuple(answer.end for answer in answers)
    return Outcome(trial, got, tuple(answer.text for answer in answers), came, got == ends and came == seen)


def _row(outcome: Outcome, because: str) -> tuple[str, ...]:
    trial, good = outcome.trial, "ok" if outcome.good else "WRONG"
    return (trial.pod, trial.does, because, _ends(outcome.ends), _all(outcome.seen), good)


def _ends(ends: tuple[str, ...]) -> str:
    return ", ".join(ends)


def _all(seen: tuple[Seen, ...]) -> str:
    return "; ".join(str(each) for each in seen) or "nothing"


def _records(instance: Instance, paper: Paper) -> bool:
    """The flow records say of every trial what the policy said."""
    expected: Counter[Recorded] = Counter(trial.record for trial in all_trials() if trial.record is not None)
    deadline = time.monotonic() + ARRIVE_S
    found = recorded_in(instance.flows)
    while found != expected and time.monotonic() < deadline:
        time.sleep(0.05)  # the records come through a file: nothing tells of them
        found = recorded_in(instance.flows)
    for record in (expected - found).elements():
        paper.bad(f"no flow record: {record}")
    for record in (found - expected).elements():
        paper.bad(f"unexpected flow record: {record}")
    if found == expected:
        paper.good(
            f"{found.total()} flow records, each with the verdict and rule above; none for what the kernel decided"
        )
    return found == expected


def _edits(scene: Scene, path: Path, paper: Paper) -> bool:
    """Block the shop's own site and allow it again, while connections come and one stays open."""
    paper.heading("The policy edited under traffic")
    allowed = path.read_text()
    blocked = allowed.replace("domain: example.com}", "domain: old.example.com}").replace(
        '"*.example.com"', '"*.old.example.com"'
    )
    cart, web = scene.pod("cart"), scene.server("web")
    begin = len(scene.journal)
    with (
        TlsSession(cart, web.ipv4, 443, SITE) as session,
        Traffic(lambda: get_tls(cart, web.ipv4, 443, SITE)) as traffic,
    ):
        calm = traffic.wait(lambda each: each.answer.end == "answered", ARRIVE_S, 40)
        edits = [
            ("own-sites no longer names example.com", edit_under(traffic, path, blocked, "answered", "reset")),
            ("it does again", edit_under(traffic, path, allowed, "reset", "answered")),
        ]
        broken = allowed.replace("action: Route", "action: Reroute")
        refused = _refused_edit(traffic, path, broken, allowed)
        kept = session.request().end
    seen, answered = arrivals_agree(scene.journal, begin, traffic.tries(), SITE)
    paper.table(
        ("the file", "first new verdict", "last old verdict", "connections", "otherwise", ""),
        [_edit_row(what, edit) for what, edit in edits],
    )
    for _, edit in edits:
        for each in sorted(set(edit.odd)):
            paper.bad(f"a connection ended in neither way: {each}")
    checks = [
        paper.check(calm, "before the edits every connection was answered"),
        *(edit.good for _, edit in edits),
        paper.check(refused, "a file with a mistake changed nothing: every connection went on being answered"),
        paper.check(
            seen == answered + 1,
            f"clients had {answered} answers, servers saw {seen} connections (one is the open one)",
        ),
        paper.check(kept == "answered", f"the connection that was open all the time: {kept}"),
    ]
    return all(checks)


def _edit_row(what: str, edit: Edit) -> tuple[str, ...]:
    return (
        what,
        f"after {edit.first_s * 1000:.0f} ms",
        f"at {max(edit.last_s, 0) * 1000:.0f} ms",
        str(edit.connections),
        str(len(edit.odd)),
        "ok" if edit.good else f"WRONG (limit {LIMIT_S:g} s)",
    )


def _refused_edit(traffic: Traffic, path: Path, broken: str, good: str) -> bool:
    """A broken file for as long as an enforced one would have taken; nothing may change."""
    begin = len(traffic.tries())
    until = replace_text(path, broken) + LIMIT_S
    traffic.wait(lambda each: each.started > until or each.answer.end != "answered", LIMIT_S + ARRIVE_S)
    replace_text(path, good)
    tries = traffic.tries()[begin:]
    return bool(tries) and all(each.answer.end == "answered" for each in tries)


def _stopped(scene: Scene, instance: Instance, paper: Paper) -> bool:
    """It ended in order and took its rules with it: the node forwards as if it had never been."""
    status = instance.stop()
    tables = scene.topology.node.run(["nft", "list", "tables"]).stdout
    begin = len(scene.journal)
    after = get_tls(scene.pod("cart"), scene.server("web").ipv4, 443, "cdn.tracker.example").end
    scene.journal.wait_ended(ARRIVE_S, begin, 1)
    return all(
        [
            paper.check(status == 0, f"exit status {status}"),
            paper.check("pellucid" not in tables, "no rule of ours is left in the kernel"),
            paper.check(after == "answered" and len(scene.journal) == begin + 1, "what was blocked passes again"),
        ]
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(prog_name="python -m pellucid_cli.demo")
