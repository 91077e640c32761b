"""One target under atheris: python -m fuzz.under_atheris TARGET [libFuzzer's options]. Started by fuzz.run."""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped]  # fuzz/requirements.lock has it

with atheris.instrument_imports(include=["pellucid_policy", "pellucid_proxy", "pellucid_cli.records"]):
    from fuzz.targets import TARGETS


def main() -> None:
    run = TARGETS[sys.argv[1]]

    def once(data: bytes) -> None:
        run(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
