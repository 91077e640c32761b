"""Errors as people read them."""

from __future__ import annotations

import pytest

from pellucid_cli.fault import Fault


@pytest.mark.parametrize("end", ["", "."])
def test_a_fault_names_field_and_cure_and_ends_with_status_1(end: str) -> None:
    fault = Fault("--scope", f"nothing is in scope{end}", f"give the pods' networks{end}")
    assert fault.format_message() == "--scope: nothing is in scope. Cure: give the pods' networks."
    assert fault.exit_code == 1
