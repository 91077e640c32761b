"""What a command prints for people: with rich on a terminal, plain and of fixed form in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


class Paper:
    """Standard output. On a terminal tables are drawn and good and bad are coloured; in a pipe it is text for grep."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty()

    def line(self, text: str) -> None:
        """A line as it is."""
        click.echo(text)

    def heading(self, text: str) -> None:
        """Begins a section."""
        click.echo()
        click.secho(text, bold=True)

    def good(self, text: str) -> None:
        """Something that is as it should be."""
        click.echo(click.style("ok     ", fg="green") + text)

    def bad(self, text: str) -> None:
        """Something that is not."""
        click.echo(click.style("WRONG  ", fg="red", bold=True) + text)

    def check(self, holds: bool, text: str) -> bool:
        """Prints text as good or bad; returns holds."""
        (self.good if holds else self.bad)(text)
        return holds

    def verdict(self, good: bool, text: str) -> None:
        """The last line."""
        click.echo()
        click.secho(
            f"{'All as expected' if good else 'NOT as expected'}, {text}.", fg="green" if good else "red", bold=True
        )

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns under header; a cell "ok" is good, one that begins with WRONG is bad."""
        if self.on_terminal:
            self._draw(header, rows)
        else:
            self._write(header, rows)

    def _draw(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, overflow="fold")  # on a narrow terminal in more lines, but whole
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        Console().print(table)

    def _write(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _style(cell: str) -> str:
    if cell.startswith("WRONG"):
        return "bold red"
    return "green" if cell == "ok" else ""
