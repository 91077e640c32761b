"""`python -m pellucid_cli` is `pellucid`."""

from __future__ import annotations

from .main import main

if __name__ == "__main__":
    main(prog_name="pellucid")
