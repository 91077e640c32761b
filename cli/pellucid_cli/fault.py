"""Errors as people read them: the field, what is wrong with it, and the cure."""

from __future__ import annotations

import click


class Fault(click.ClickException):
    """Ends the command with `Error: field: what. Cure: cure.` on standard error and exit status 1."""

    def __init__(self, field: str, what: str, cure: str) -> None:
        super().__init__(f"{field}: {what.rstrip('.')}. Cure: {cure.rstrip('.')}.")
