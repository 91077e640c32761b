"""`pellucid explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import click

from ..arguments import NETWORK, auto_output_option, state_option, wants_json
from ..destination import DESTINATION, Destination

if TYPE_CHECKING:
    from pellucid_proxy.explain import Explanation, Question

    from ..paper import Paper

TCP = 6
ALLOWED, BLOCKED, NOBODY_TO_ASK, CANNOT_TELL = 0, 1, 2, 3
_NEAR_SHOWN = 5


@click.command(name="explain")
@click.argument("source")
@click.argument("destination", type=DESTINATION)
@click.option("--sni", metavar="NAME", help="The client begins TLS and asks for NAME.")
@click.option(
    "--request",
    metavar="REQUEST",
    help="The client sends this request: 'GET http://NAME/PATH'; of https, TLS for NAME.",
)
@click.option(
    "--no-name",
    is_flag=True,
    help="The client sends no name: it waits for the server to speak, or speaks another protocol.",
)
@click.option(
    "--first-bytes",
    type=click.File("rb"),
    metavar="FILE",
    help="The client sends what FILE holds before any answer; - is standard input.",
)
@click.option("--address", metavar="ADDRESS", help="What the name in DESTINATION resolves to for the pod.")
@click.option(
    "--policy",
    type=click.Path(exists=True),
    multiple=True,
    metavar="DIR",
    help="Explain by these files instead of a running node's policy.",
)
@click.option(
    "--scope",
    type=NETWORK,
    multiple=True,
    metavar="CIDR",
    help="With --policy: as for `run`. [default: the files' TransparentProxy object, else every address]",
)
@state_option
@auto_output_option
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    destination: Destination,
    sni: str | None,
    request: str | None,
    no_name: bool,
    first_bytes: BinaryIO | None,
    address: str | None,
    policy: tuple[str, ...],
    scope: tuple[str, ...],
    state: str,
    output: str,
) -> None:
    """Explain what becomes of a flow, by which rule, and why by no rule before.

    SOURCE is a pod (namespace/name) or an address. DESTINATION is ADDRESS:PORT or NAME:PORT, of UDP with /udp behind it,
    or ADDRESS/icmp. A NAME is what the client asks for (HTTP on port 80, else TLS); its address is the pod's resolver's,
    so give it with --address, or be told what is certain without.

    The running node answers, by the code that decides real flows: the session of its workers is fed with the bytes that
    the client would send. With --policy the same code answers for files, without a node.

    \b
    pellucid explain shop/cart 192.0.2.10:443 --sni api.example.com
    pellucid explain shop/cart api.example.com:443 --address 192.0.2.10
    pellucid explain 10.244.1.7 192.0.2.53:53/udp -o json
    pellucid explain shop/cart 192.0.2.10:80 --request 'GET http://example.com/' --policy policies/

    \b
    Exit status: 0 allowed (or routed)
                 1 blocked
                 2 nothing runs with this state folder, no such pod, or wrong usage
                 3 cannot be told without the name or the address
    """
    from pellucid_proxy.agent.status import NotRunning
    from pellucid_proxy.explain import Unexplainable

    question = _question(ctx, source, destination, _First(sni, request, no_name, first_bytes), address)
    try:
        found = _by_files(question, policy, scope) if policy else _by_node(question, state)
    except NotRunning as err:
        _fail(ctx, str(err), err.cure, output)
    except Unexplainable as err:
        _fail(ctx, str(err), err.cure, output)
    else:
        if wants_json(output):
            import msgspec

            click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        else:
            from ..paper import Paper

            _show(found, Paper())
        ctx.exit(CANNOT_TELL if found.verdict is None else BLOCKED if found.verdict == "Block" else ALLOWED)


def _fail(ctx: click.Context, what: str, cure: str, output: str) -> None:
    """Nobody can answer: in JSON where that is asked for, else on standard error."""
    if wants_json(output):
        import msgspec

        click.echo(msgspec.json.encode({"error": what, "cure": cure}).decode())
    else:
        click.echo(
            f"Error: {what}." + (f" Cure: {cure.rstrip('.?')}{'?' if cure.endswith('?') else '.'}" if cure else ""),
            err=True,
        )
    ctx.exit(NOBODY_TO_ASK)


class _First(NamedTuple):
    """What was said of the client's first bytes; at most one of it."""

    sni: str | None
    request: str | None
    no_name: bool
    file: BinaryIO | None

    def given(self) -> int:
        return sum((self.sni is not None, self.request is not None, self.no_name, self.file is not None))

    def bytes_for(self, destination: Destination) -> bytes | None:
        """None: it is not known what the client sends. Raises ValueError."""
        from pellucid_proxy.explain import MAX_FIRST_BYTES

        from ..first_bytes import hello, request_bytes

        if self.file is not None:
            return self.file.read(MAX_FIRST_BYTES + 1)
        if self.no_name:
            return b""
        if self.request is not None:
            return request_bytes(self.request)
        if self.sni is not None:
            return hello(self.sni)
        if destination.name is None or destination.protocol != TCP:
            return None
        return request_bytes(f"GET http://{destination.name}/") if destination.port == 80 else hello(destination.name)


def _question(
    ctx: click.Context, source: str, destination: Destination, first: _First, address: str | None
) -> Question:
    """Raises click.UsageError."""
    from pellucid_proxy.explain import MAX_FIRST_BYTES, Question

    if first.given() > 1:
        raise click.UsageError("--sni, --request, --no-name and --first-bytes exclude each other.", ctx)
    if first.given() and destination.protocol != TCP:
        raise click.UsageError("--sni, --request, --no-name and --first-bytes are for TCP.", ctx)
    if address is not None and destination.address is not None:
        raise click.UsageError("--address is for a destination that is a name.", ctx)
    try:
        sent = first.bytes_for(destination)
    except ValueError as err:
        raise click.UsageError(str(err), ctx) from err
    if sent is not None and len(sent) > MAX_FIRST_BYTES:
        raise click.UsageError(
            f"The client's first bytes are too many: at most {MAX_FIRST_BYTES} can be asked about.", ctx
        )
    return Question(
        source=source,
        destination=destination.address or address,
        port=destination.port,
        protocol=destination.protocol,
        first=sent,
    )


def _by_node(question: Question, state: str) -> Explanation:
    from pellucid_proxy.agent.explanations import read_explanation

    return read_explanation(state, question)


def _by_files(question: Question, paths: tuple[str, ...], scope: tuple[str, ...]) -> Explanation:
    from pellucid_proxy.explain import explain

    from ..policy_files import compiled, offline_settings, read_objects

    objects = read_objects("--policy", paths)
    return explain(question, compiled(objects), objects, offline_settings(objects, scope), ())


def _show(found: Explanation, paper: Paper) -> None:
    colour = {"Allow": "green", "Block": "red", "Route": "cyan"}.get(found.verdict or "", "yellow")
    verdict = found.verdict or "Cannot be told"
    paper.line(f"{click.style(verdict, fg=colour, bold=True)}  {found.source} → {_where(found)}")
    for name, value in _facts(found):
        paper.line(f"{name:<10}{value}")
    paper.heading("The way")
    for number, step in enumerate(found.steps, 1):
        paper.line(f"  {number}  {step.said}")
    if found.possible:
        paper.heading("What may happen")
        paper.table(
            ("verdict", "rule", "by", "when"),
            [
                (each.verdict or "?", _rule(each.policy) if each.policy else each.reason, each.decided_by, each.when)
                for each in found.possible
            ],
        )
    _show_earlier(found, paper)
    for line in found.recent:
        from ..records import flow_text

        paper.line(f"  {flow_text(bytes(line))}")


def _show_earlier(found: Explanation, paper: Paper) -> None:
    near = [each for each in found.earlier if each.near]
    others = len(found.earlier) - len(near) + found.earlier_more
    if near:
        paper.heading("Why not an earlier rule")
        for each in near[-_NEAR_SHOWN:]:
            paper.line(f"  {each.action:<9} {_rule(each.policy)}: {each.why}")
        others += max(0, len(near) - _NEAR_SHOWN)
    if others:
        more = "more " if near else "earlier "
        paper.line(
            f"{'' if not near else '  '}{others} {more}rule{'s' * (others != 1)} did not match (-o json tells why)"
        )


def _where(found: Explanation) -> str:
    from ..destination import place

    at = place(found.destination, found.port, found.protocol)
    return f"{found.name} ({at})" if found.name else at


def _facts(found: Explanation) -> list[tuple[str, str]]:
    facts = [("decided", f"by the {found.decided_by}, {found.reason}")]
    if found.policy:
        written = f"  ({found.policy.written})" if found.policy.written else ""
        facts.append(("rule", f"{found.policy.kind} {_rule(found.policy)}{written}"))
    if found.response:
        facts.append(("client", f"gets {found.response}" if found.response != "nothing answers" else found.response))
    if found.route:
        facts.append(("route", found.route))
    if found.audit:
        said = _rule(found.audit.policy) if found.audit.policy else found.audit.reason
        facts.append(("on trial", f"rules in mode Audit would {found.audit.verdict.lower()} it: {said}"))
    if found.kernel_counter:
        count = "" if found.packets is None else f", {found.packets} decided so far by this rule"
        facts.append(("counter", f"{found.kernel_counter}{count}"))
    if found.advice:
        facts.append(("if wrong", found.advice))
    return facts


def _rule(policy: object) -> str:
    namespace, name, rule = (getattr(policy, field) for field in ("namespace", "name", "rule"))
    return f"{namespace}/{name} {rule}" if namespace else f"{name} {rule}"
