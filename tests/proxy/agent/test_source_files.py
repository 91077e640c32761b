"""A folder is read as one whole, and every way to change it is noticed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pellucid_proxy.agent import source_files
from pellucid_proxy.agent.source_files import FolderWatch, UnreadableFolder, fingerprint, read_folder, written_at

NOTICED_WITHIN_S = 1.0


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UnreadableFolder) as raised:
        read_folder(str(folder))
    return "\n".join(raised.value.problems)


def test_manifests_are_read_in_order_of_path_from_folders_within_too(tmp_path: Path) -> None:
    fill(tmp_path, b="2", a="1")
    fill(tmp_path / "more", c="3")
    (tmp_path / "d.yml").write_text("4")
    (tmp_path / "e.json").write_text("5")
    files = read_folder(str(tmp_path))
    assert [file.path for file in files] == [
        str(tmp_path / name) for name in ("a.yaml", "b.yaml", "d.yml", "e.json", "more/c.yaml")
    ]
    assert [file.content for file in files] == [b"1", b"2", b"4", b"5", b"3"]


@pytest.mark.parametrize(
    "name", [".a.yaml.swp", ".a.yaml", "a.yaml~", "#a.yaml#", "4913", "a.yaml.bak", ".hidden/a.yaml", "notes.md"]
)
def test_what_editors_and_people_leave_beside_is_no_manifest(tmp_path: Path, name: str) -> None:
    fill(tmp_path, good="1")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    before = fingerprint(str(tmp_path))
    (tmp_path / name).write_text("x")
    assert [file.path for file in read_folder(str(tmp_path))] == [str(tmp_path / "good.yaml")]
    assert fingerprint(str(tmp_path)) == before


def test_a_folder_without_manifests_is_refused_for_it_may_be_half_written(tmp_path: Path) -> None:
    assert "holds no manifest" in refusal(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "away")
        == f"{tmp_path / 'away'}: No such file or directory; make it readable or take it away"
    )


def test_an_empty_file_is_refused_for_it_may_be_half_written(tmp_path: Path) -> None:
    fill(tmp_path, good="1", empty=" \n")
    assert (
        refusal(tmp_path)
        == f"{tmp_path / 'empty.yaml'}: is empty: perhaps it is being written; make it readable or take it away"
    )


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is not a regular file" in refusal(tmp_path)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("nowhere")
    assert "No such file or directory" in refusal(tmp_path)


def test_folders_in_circles_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, good="1")
    (tmp_path / "again").symlink_to(tmp_path)
    assert "Too many levels of symbolic links" in refusal(tmp_path)


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "MAX_FILE_BYTES", 3)
    fill(tmp_path, big="1234")
    assert "is larger than" in refusal(tmp_path)


def test_no_mixture_of_two_states_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, a="old", b="old")
    content = source_files._content
    edits = iter(["new"])

    def edited_meanwhile(path: str, identity: tuple[int, ...]) -> bytes:
        read = content(path, identity)
        for text in edits:
            fill(tmp_path, a=text, b=text)
        return read

    monkeypatch.setattr(source_files, "_content", edited_meanwhile)
    assert {file.content for file in read_folder(str(tmp_path))} == {b"new"}


def write(folder: Path) -> None:
    (folder / "a.yaml").write_text("new text")


def write_same_size(folder: Path) -> None:
    (folder / "a.yaml").write_text("2")


def replace(folder: Path) -> None:
    (folder / ".a.tmp").write_text("2")
    (folder / ".a.tmp").rename(folder / "a.yaml")


def add(folder: Path) -> None:
    fill(folder, b="2")


def add_folder(folder: Path) -> None:
    fill(folder / "more", b="2")


def remove(folder: Path) -> None:
    (folder / "a.yaml").unlink()


def rename_folder(folder: Path) -> None:
    fill(folder.parent / "next", a="2")
    folder.rename(folder.parent / "last")
    (folder.parent / "next").rename(folder)


def remove_folder(folder: Path) -> None:
    folder.rename(folder.parent / "gone")


CHANGES = [write, write_same_size, replace, add, add_folder, remove, rename_folder, remove_folder]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("events", [True, False], ids=["told by the kernel", "by looking"])
def test_every_change_is_noticed_in_time(
    tmp_path: Path, change: Callable[[Path], None], events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "policy", a="1")
    assert asyncio.run(notices(folder, lambda: change(folder), events))


def test_a_switched_link_to_the_folder_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path / "one", a="1")
    fill(tmp_path / "two", a="1")
    folder = tmp_path / "policy"
    folder.symlink_to("one")

    def switch() -> None:
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(folder)

    assert asyncio.run(notices(folder, switch))


def test_a_mounted_configmap_is_noticed_when_it_switches(tmp_path: Path) -> None:
    fill(tmp_path / "policy" / "..2026_1", a="1")
    fill(tmp_path / "policy" / "..2026_2", a="2")
    folder = tmp_path / "policy"
    (folder / "..data").symlink_to("..2026_1")
    (folder / "a.yaml").symlink_to("..data/a.yaml")

    def switch() -> None:
        (folder / "..data_tmp").symlink_to("..2026_2")
        (folder / "..data_tmp").rename(folder / "..data")

    assert asyncio.run(notices(folder, switch))
    assert [file.content for file in read_folder(str(folder))] == [b"2"]


def test_a_folder_that_was_replaced_is_watched_on(tmp_path: Path) -> None:
    folder = fill(tmp_path / "policy", a="1")

    async def both() -> None:
        watch = FolderWatch(str(folder), fingerprint(str(folder)))
        async with asyncio.timeout(10):
            notice = asyncio.create_task(watch.notice())
            rename_folder(folder)
            await watch.changed()
            write(folder)
            await watch.changed()
            notice.cancel()

    asyncio.run(both())


def test_a_folder_that_stays_as_it_is_wakes_nobody(tmp_path: Path) -> None:
    folder = fill(tmp_path, a="1")

    async def quiet() -> bool:
        seen = fingerprint(str(folder))
        return await FolderWatch(str(folder), seen).changed(patience_s=0.6) == seen

    assert asyncio.run(quiet())


def test_the_newest_change_says_when_it_was_written(tmp_path: Path) -> None:
    before = fingerprint(str(fill(tmp_path, a="1", b="1")))
    write(tmp_path)
    now = fingerprint(str(tmp_path))
    assert written_at(now, before) == (tmp_path / "a.yaml").stat().st_ctime_ns / 1e9
    remove(tmp_path)
    assert written_at(fingerprint(str(tmp_path)), now) is None


async def notices(folder: Path, change: Callable[[], None], events: bool = True) -> bool:
    """Whether changed() returns within the time that a swap may take, and says what is there then."""
    watch = FolderWatch(str(folder), fingerprint(str(folder)))
    notice = asyncio.create_task(watch.notice()) if events else None
    changed = asyncio.create_task(watch.changed())
    await asyncio.sleep(0)
    change()
    async with asyncio.timeout(NOTICED_WITHIN_S):
        found = await changed
    if notice is not None:
        notice.cancel()
    return found == fingerprint(str(folder))
