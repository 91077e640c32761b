"""`pellucid version`."""

from __future__ import annotations

import platform

import click

from pellucid_proxy import __version__


def engine_form() -> str:
    """compiled or uncompiled: which form of the engine a worker of this installation runs."""
    from pellucid_proxy.engine import relay

    return "compiled" if relay.compiled else "uncompiled"


def lines() -> list[str]:
    """What --version prints, a line each."""
    return [
        f"pellucid {__version__}",
        f"python   {platform.python_version()}",
        f"engine   {engine_form()}",
    ]


@click.command(name="version")
def command() -> None:
    """Show the versions of Pellucid and Python, and which form of the engine runs.

    Compiled is the fast one, made where a C compiler was there at build time; uncompiled is the same source run by
    Python, several times slower: good for tests, not for figures.
    """
    click.echo("\n".join(lines()))
