"""Records reach the file whole, in a worker's order, and a bad file costs records and nothing else."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pellucid_proxy.agent import flows
from pellucid_proxy.agent.flows import FlowFile, FlowPipe
from pellucid_proxy.supervisor.children import flow_pipe

from .fakes import eventually as soon

PATIENCE_S = 10.0


def eventually(holds: Callable[[], bool]) -> None:
    """Another thread writes: wait for it, but not for ever."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flows.json"


@pytest.fixture
def file(path: Path) -> Iterator[FlowFile]:
    opened = FlowFile(str(path))
    yield opened
    opened.close(PATIENCE_S)


def test_lines_are_appended_to_what_is_there(path: Path) -> None:
    path.write_bytes(b"old\n")
    file = FlowFile(str(path))
    file.put(b"1\n2\n")
    file.put(b"3\n")
    file.close(PATIENCE_S)
    assert path.read_bytes() == b"old\n1\n2\n3\n"


def test_a_renamed_file_is_left_and_a_new_one_made(path: Path, file: FlowFile) -> None:
    file.put(b"1\n")
    eventually(lambda: path.read_bytes() == b"1\n")
    path.rename(path.with_suffix(".1"))
    file.put(b"2\n")
    eventually(path.exists)
    file.close(PATIENCE_S)
    assert (path.with_suffix(".1").read_bytes(), path.read_bytes()) == (b"1\n", b"2\n")


def test_reopening_makes_the_file_at_once(path: Path, file: FlowFile) -> None:
    path.rename(path.with_suffix(".1"))
    file.reopen()
    eventually(path.exists)


def test_a_file_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FlowFile(str(tmp_path / "away" / "flows.json"))


def test_a_named_pipe_that_nobody_reads_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address"):
        FlowFile(str(tmp_path / "fifo"))


def test_a_folder_that_went_away_loses_nothing(path: Path, file: FlowFile, caplog: pytest.LogCaptureFixture) -> None:
    held = os.open(path, os.O_RDONLY)
    path.unlink()
    path.mkdir()
    file.put(b"1\n")
    eventually(lambda: os.fstat(held).st_size == 2)
    os.close(held)
    assert "cannot be opened again: Is a directory; going on with the renamed one" in caplog.text
    path.rmdir()


def test_a_stopped_reader_costs_counted_records_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_QUEUE_BYTES", 1 << 20)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    file = FlowFile(str(fifo))
    line = b"x" * 1023 + b"\n"
    before = time.monotonic()
    for _ in range(4096):
        file.put(line)
    assert time.monotonic() - before < 1.0
    assert file.dropped >= 4096 - 1024 - 64 - 1  # all but what the queue and the pipe hold
    file.close(0.0)
    os.close(reader)
    eventually(lambda: file.dropped >= 4096 - 64)  # what was taken from the queue is counted too, once it fails


def test_a_full_disk_leaves_no_half_line_and_is_counted(
    path: Path, file: FlowFile, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        file.put(b"12345\n1234567\n12\n")
        eventually(lambda: file.dropped == 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == b"12345\n"
    file.put(b"again\n")
    eventually(lambda: path.read_bytes() == b"12345\nagain\n")
    assert "cannot be written: File too large; records are lost until it can" in caplog.text


def test_a_record_cut_at_any_byte_arrives_whole(path: Path) -> None:
    records = b'{"a":1}\n{"b":2}\n'

    async def run(cut: int) -> None:
        file = FlowFile(str(path))
        read_end, write_end = flow_pipe()
        pipe = FlowPipe(read_end, file)
        os.write(write_end, records[:cut])
        await asyncio.sleep(0)
        pipe._read()
        os.write(write_end, records[cut:])
        os.close(write_end)
        pipe.close()
        file.close(PATIENCE_S)

    for cut in range(len(records) + 1):
        asyncio.run(run(cut))
        assert path.read_bytes() == records
        path.unlink()


def test_what_two_workers_write_is_mixed_by_whole_lines_only(path: Path) -> None:
    async def run() -> None:
        file = FlowFile(str(path))
        ends = [flow_pipe() for _ in range(2)]
        pipes = [FlowPipe(read_end, file) for read_end, _ in ends]
        waiting = {write_end: [b"%d" % at * 300 + b"\n"] * 500 for at, (_, write_end) in enumerate(ends)}
        texts = {write_end: b"".join(lines) for write_end, lines in waiting.items()}
        while any(texts.values()):
            for write_end, text in texts.items():
                texts[write_end] = text[os.write(write_end, text[:777]) :] if text else b""
            await asyncio.sleep(0)
        for _, write_end in ends:
            os.close(write_end)
        for pipe in pipes:
            pipe.close()
        file.close(PATIENCE_S)

    asyncio.run(run())
    lines = path.read_bytes().splitlines()
    assert sorted(set(lines)) == [b"0" * 300, b"1" * 300]
    assert len(lines) == 1000


def test_records_arrive_without_being_asked_for_and_the_end_closes_the_pipe(path: Path) -> None:
    async def run() -> None:
        file = FlowFile(str(path))
        read_end, write_end = flow_pipe()
        pipe = FlowPipe(read_end, file)
        os.write(write_end, b"1\n")
        await soon(lambda: path.read_bytes() == b"1\n")
        os.close(write_end)
        await soon(lambda: pipe._fd < 0)
        file.close(PATIENCE_S)

    asyncio.run(run())


def test_a_line_without_end_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_LINE_BYTES", 100)

    async def run() -> int:
        file = FlowFile(str(path))
        read_end, write_end = flow_pipe()
        pipe = FlowPipe(read_end, file)
        os.write(write_end, b"x" * 101)
        os.close(write_end)
        pipe.close()
        file.close(PATIENCE_S)
        return file.dropped

    assert asyncio.run(run()) == 1
