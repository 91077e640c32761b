"""`pellucid lint`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import click

from ..arguments import output_option

if TYPE_CHECKING:
    from pellucid_policy.objects import Objects, Problem

STDIN = "<stdin>"


@click.command(name="lint")
@click.argument(
    "paths", nargs=-1, required=True, metavar="DIR|FILE|-...", type=click.Path(exists=True, allow_dash=True)
)
@output_option
@click.pass_context
def command(ctx: click.Context, paths: tuple[str, ...], output: str) -> None:
    """Check policy files: everything this node would refuse, with line and cure. Needs no rights and touches nothing.

    All paths together are one policy, as a folder is for `pellucid run`; - is standard input. Each problem is a line

    \b
        FILE:LINE: FIELD: what is wrong. Cure: what to do.

    which editors and CI systems know how to read. With -o json: {"files", "objects", "problems": [{"file", "line", "path",
    "message", "cure"}]}.

    \b
    pellucid lint examples/quickstart
    kubectl get transparentpolicies -A -o yaml | pellucid lint -

    \b
    Exit status: 0 it would be taken, 1 it would be refused, 2 wrong usage
    """
    import msgspec

    files, problems = _read(paths)
    objects, found = _check(files)
    problems += found
    if output == "json":
        answer = {"files": len(files), "objects": objects, "problems": problems}
        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        _print(len(files), objects, problems)
    ctx.exit(1 if problems else 0)


def _read(paths: Iterable[str]) -> tuple[dict[str, bytes], list[Problem]]:
    """Contents by name, and what cannot be read. Folders by the same rules as `pellucid run`."""
    from pellucid_policy.objects import Problem
    from pellucid_proxy.agent.source_files import UnreadableFolder, read_folder

    files: dict[str, bytes] = {}
    problems: list[Problem] = []
    for path in paths:
        try:
            if path == "-":
                files[STDIN] = sys.stdin.buffer.read()
            elif os.path.isdir(path):
                files.update({file.path: file.content for file in read_folder(path)})
            else:
                with open(path, "rb") as opened:
                    files[path] = opened.read()
        except UnreadableFolder as err:
            problems += [_unreadable(path, each) for each in err.problems]
        except OSError as err:
            problems.append(Problem(path, 1, "", f"cannot be read: {err.strerror}", "make it readable or take it away"))
    return files, problems


def _unreadable(folder: str, said: str) -> Problem:
    from pellucid_policy.objects import Problem

    file, _, rest = said.partition(": ")
    message, _, cure = rest.partition("; ")
    return Problem(file, 1, "", message, cure) if rest else Problem(folder, 1, "", said)


def _check(files: Mapping[str, bytes]) -> tuple[int, list[Problem]]:
    """How many objects could be read, and every problem: of the parser and its checks, and of what this release does not do."""
    from pellucid_policy.objects import Objects
    from pellucid_policy.parse import parse_files

    whole = parse_files(files)
    if isinstance(whole, Objects):
        return len(whole.all()), _unsupported(whole)
    count, found = 0, set(whole)
    for file, content in files.items():  # what is good by itself is told what this release lacks, all the same
        part = parse_files({file: content})
        if isinstance(part, Objects):
            count += len(part.all())
            found.update(_unsupported(part))
    return count, sorted(found)


def _unsupported(objects: Objects) -> list[Problem]:
    from pellucid_policy.features import unsupported

    return unsupported(objects)


def _print(files: int, objects: int, problems: list[Problem]) -> None:
    for each in problems:
        where = click.style(f"{each.file}:{each.line}:", bold=True)
        path = f" {click.style(each.path, fg='cyan')}:" if each.path else ""
        cure = f" {click.style('Cure:', fg='green')} {_sentence(each.cure)}" if each.cure else ""
        click.echo(f"{where}{path} {_sentence(each.message)}{cure}")
    if problems:
        click.secho(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}: this would be refused as a whole", fg="red", err=True
        )
    else:
        click.secho(
            f"good: {files} file{'s' * (files != 1)}, {objects} object{'s' * (objects != 1)}", fg="green", err=True
        )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
