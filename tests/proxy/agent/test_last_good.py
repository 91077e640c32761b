"""The last good policy survives power cuts and is never trusted when it is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pellucid_policy.compile import compile_policies
from pellucid_policy.objects import Objects
from pellucid_proxy.agent import last_good
from pellucid_proxy.agent.last_good import Unusable, load, save
from pellucid_proxy.agent.node_settings import Wishes
from pellucid_proxy.agent.policy import Accepted
from pellucid_proxy.supervisor.options import LAST_GOOD as NAME

ACCEPTED = Accepted(compile_policies(Objects()), Wishes(scope=("192.0.2.0/24",), workers=2))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(str(tmp_path), ACCEPTED)
    assert load(str(tmp_path)) == ACCEPTED
    assert os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_there_is_none_at_first(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="there is none yet"):
        load(str(tmp_path))


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    save(str(tmp_path), ACCEPTED)
    whole = (tmp_path / NAME).read_bytes()
    for at in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Unusable):
            load(str(tmp_path))


def test_a_file_cut_anywhere_is_found(tmp_path: Path) -> None:
    save(str(tmp_path), ACCEPTED)
    whole = (tmp_path / NAME).read_bytes()
    for size in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:size])
        with pytest.raises(Unusable):
            load(str(tmp_path))


def test_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    other = last_good._Envelope(2, b"", b"")
    (tmp_path / NAME).write_bytes(msgspec.msgpack.encode(other))
    with pytest.raises(Unusable, match="has format 2, this version reads 1"):
        load(str(tmp_path))


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(str(tmp_path), ACCEPTED)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(str(tmp_path), Accepted(ACCEPTED.policy, Wishes()))
    assert load(str(tmp_path)) == ACCEPTED
    assert os.listdir(tmp_path) == [NAME]
