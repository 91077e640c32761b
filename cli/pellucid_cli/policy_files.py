"""Policy files for commands that look at them without a node."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from .fault import Fault

if TYPE_CHECKING:
    from pellucid_policy.objects import Objects
    from pellucid_policy.program import PolicySet
    from pellucid_proxy.settings import NodeSettings

EVERYWHERE = ("0.0.0.0/0", "::/0")


def read_objects(option: str, paths: Iterable[str]) -> Objects:
    """What the files and folders at paths hold together, as `pellucid run` reads a folder. Raises Fault after telling every problem."""
    from pellucid_policy.features import unsupported
    from pellucid_policy.objects import Objects
    from pellucid_policy.parse import parse_files

    shown = list(paths)
    found = parse_files(_contents(option, shown))
    problems = unsupported(found) if isinstance(found, Objects) else found
    if isinstance(found, Objects) and not problems:
        return found
    click.echo("\n".join(map(str, problems)), err=True)
    raise Fault(
        option,
        f"{', '.join(shown)} would be refused",
        f"mend what is said above; `pellucid lint {' '.join(shown)}` says it again",
    )


def _contents(option: str, paths: Iterable[str]) -> dict[str, bytes]:
    from pellucid_proxy.agent.source_files import UnreadableFolder, read_folder

    files: dict[str, bytes] = {}
    for path in paths:
        try:
            if os.path.isdir(path):
                files.update({file.path: file.content for file in read_folder(path)})
            else:
                with open(path, "rb") as opened:
                    files[path] = opened.read()
        except UnreadableFolder as err:
            raise Fault(option, str(err), "give a folder of manifests") from err
        except OSError as err:
            raise Fault(option, f"{path}: {err.strerror}", "make it readable") from err
    return files


def compiled(objects: Objects) -> PolicySet:
    """What a node would enforce."""
    from pellucid_policy.compile import compile_policies

    return compile_policies(objects)


def offline_settings(objects: Objects, scope: tuple[str, ...]) -> NodeSettings:
    """A node's settings as far as files say them. scope: what was given; else the files' podCIDRs, else every address."""
    from pellucid_proxy.agent.node_settings import node_settings
    from pellucid_proxy.agent.policy import wishes_of
    from pellucid_proxy.supervisor.options import Refusal, RunOptions

    wishes = wishes_of(objects)
    try:
        return node_settings(RunOptions(policy="", scope=scope or wishes.scope or EVERYWHERE), wishes)
    except Refusal as err:
        raise Fault("--policy", str(err), "mend the TransparentProxy object") from err
