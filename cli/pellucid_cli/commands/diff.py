"""`pellucid diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from ..arguments import NETWORK, auto_output_option, state_option, wants_json
from ..fault import Fault

if TYPE_CHECKING:
    from pellucid_policy.objects import Objects
    from pellucid_policy.verdict import Verdict
    from pellucid_proxy.agent.status import NodeStatus
    from pellucid_proxy.replay import Recorded, Replay

    from ..flow_source import Line

SAME, CHANGES, NOBODY_TO_ASK, CANNOT_TELL = 0, 1, 2, 3
MAX_GROUPS = 100_000


class Group(NamedTuple):
    """Flows that change alike. before, after: verdict and rule."""

    source: str
    destination: str
    before: str
    after: str


@click.command(name="diff")
@click.option(
    "-f",
    "--filename",
    "changed",
    type=click.Path(exists=True),
    multiple=True,
    required=True,
    metavar="PATH",
    help="Files or folders of the change: its objects take the place of those of the same kind, namespace and name, or are new.",
)
@click.option(
    "--policy",
    type=click.Path(exists=True),
    multiple=True,
    metavar="PATH",
    help="What is changed. [default: the running node's folder]",
)
@click.option(
    "--flows",
    metavar="FILE",
    help="Recorded flows; - is standard input. [default: the running node's flow file, else what its agent keeps]",
)
@click.option(
    "--scope",
    type=NETWORK,
    multiple=True,
    metavar="CIDR",
    help="As for `run`. [default: the node's, else as the files say]",
)
@state_option
@auto_output_option
@click.pass_context
def command(
    ctx: click.Context,
    changed: tuple[str, ...],
    policy: tuple[str, ...],
    flows: str | None,
    scope: tuple[str, ...],
    state: str,
    output: str,
) -> None:
    """Replay recorded flows against a changed policy, and show the verdicts that change.

    Each flow's facts (pod, destination, name, protocol) are judged by the code of the data path, under the policy that
    is and under the changed one. A verdict changes when the flow would feel it: allowed, blocked in another way, routed
    elsewhere; that another rule says the same is no change.
    Where a record lacks a fact that matters, the flow counts as "cannot tell", never as unchanged. Flows that the kernel
    decided alone are not recorded, so nothing is said of them.

    \b
    pellucid diff -f policies/cart.yaml
    pellucid diff -f new/ --policy policies/ --flows flows.jsonl -o json | jq .changes

    \b
    Exit status: 0 no verdict changes
                 1 some do
                 2 nothing runs with this state folder, or wrong usage (1 with a message: a file is refused)
                 3 none is known to change, but some flows cannot be told
    """
    from pellucid_proxy.agent.status import NotRunning, read_status
    from pellucid_proxy.replay import Replay

    from ..policy_files import compiled, offline_settings, read_objects

    try:
        node = None if policy and flows else read_status(state)
        objects = read_objects("--policy", policy or _folder(node))
        merged = _merged(objects, read_objects("-f", changed))
        settings = offline_settings(objects, scope or _scope(node))
        replay = Replay(compiled(objects), compiled(merged), settings, offline_settings(merged, scope or _scope(node)))
        found = _Found(replay)
        for line in _lines(flows, node, state):
            found.take(line)
    except NotRunning as err:
        click.echo(f"Error: {err}. Cure: {err.cure}; or give --policy and --flows, which need no node.", err=True)
        ctx.exit(NOBODY_TO_ASK)
    else:
        found.print_json() if wants_json(output) else found.print_text()
        ctx.exit(found.status())


def _folder(node: NodeStatus | None) -> tuple[str, ...]:
    assert node is not None
    return (node.folder,)


def _scope(node: NodeStatus | None) -> tuple[str, ...]:
    return node.scope if node is not None else ()


def _lines(flows: str | None, node: NodeStatus | None, state: str) -> Iterator[Line]:
    from ..flow_source import from_file, from_node

    path = flows or (node.flows if node is not None and node.flows != "-" else None)
    if path is not None:
        return from_file(path, follow=False)
    return from_node(state, history=True, follow=False, said=_say_kept, lost=lambda _count: None)


def _say_kept(recorded: bool, _path: str | None) -> None:
    if not recorded:
        click.echo("The node runs without --flows: only what was observed lately is replayed.", err=True)


def _merged(objects: Objects, changed: Objects) -> Objects:
    """Raises Fault where both do not go together."""
    from pellucid_policy.check import between
    from pellucid_policy.objects import collect, key_of

    by_key = {key_of(each): each for each in (*objects.all(), *changed.all())}
    merged = collect(list(by_key.values()), {**objects.origins, **changed.origins})
    problems = between(merged)
    if problems:
        click.echo("\n".join(map(str, problems)), err=True)
        raise Fault("-f", "the change does not go with what is there", "mend what is said above")
    return merged


class _Found:
    """What the replay came to."""

    def __init__(self, replay: Replay) -> None:
        from msgspec import json

        from pellucid_proxy.replay import Recorded

        self._replay = replay
        self._decoder = json.Decoder(Recorded)
        self.changes: Counter[Group] = Counter()
        self.untold: Counter[str] = Counter()
        self.flows = self.unchanged = 0

    def take(self, line: Line) -> None:
        from msgspec import MsgspecError

        from pellucid_proxy.replay import CHANGED, UNCHANGED

        if line.kind != "flow":
            return
        self.flows += 1
        try:
            flow = self._decoder.decode(line.text)
            answer = self._replay.judged(flow)
        except (MsgspecError, ValueError):
            self.untold["it is no flow record, or one of another version"] += 1
            return
        if answer.result == UNCHANGED:
            self.unchanged += 1
        elif answer.result == CHANGED and answer.before is not None and answer.after is not None:
            group = Group(_source(flow), _destination(flow), _said(answer.before), _said(answer.after))
            if len(self.changes) >= MAX_GROUPS and group not in self.changes:
                group = Group("more", "more", "", "")
            self.changes[group] += 1
        else:
            self.untold[answer.why] += 1

    def status(self) -> int:
        return CHANGES if self.changes else CANNOT_TELL if self.untold else SAME

    def print_json(self) -> None:
        import msgspec

        told = {
            "flows": self.flows,
            "unchanged": self.unchanged,
            "changed": self.changes.total(),
            "cannotTell": self.untold.total(),
            "changes": [{**group._asdict(), "flows": count} for group, count in self.changes.most_common()],
            "why": [{"why": why, "flows": count} for why, count in self.untold.most_common()],
        }
        click.echo(msgspec.json.format(msgspec.json.encode(told)).decode())

    def print_text(self) -> None:
        from ..paper import Paper

        paper = Paper()
        if self.changes:
            rows = [(str(count), *group) for group, count in self.changes.most_common()]
            paper.table(("flows", "pod", "destination", "now", "with the change"), rows)
        for why, count in self.untold.most_common():
            paper.line(f"{count} cannot be told: {why}")
        paper.line(
            f"{self.flows} recorded flows: {self.changes.total()} change, {self.unchanged} do not, {self.untold.total()} cannot be told"
        )


def _source(flow: Recorded) -> str:
    return f"{flow.source.namespace}/{flow.source.pod}" if flow.source.pod else flow.source.address


def _destination(flow: Recorded) -> str:
    from ..destination import place

    to = flow.destination
    return f"{to.name}:{to.port}" if to.name else place(to.address, to.port, "TCP")


def _said(verdict: Verdict) -> str:
    from pellucid_policy.verdict import Action

    action = verdict.action.value
    how = f" ({verdict.response.value})" if verdict.action is Action.BLOCK else ""
    by = f"{verdict.rule.policy}/{verdict.rule.rule}" if verdict.rule else verdict.reason.value
    return f"{action}{how} by {by}"
