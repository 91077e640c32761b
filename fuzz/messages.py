"""What must hold of the messages between processes, of upstream proxies' answers, and of what is asked of the status socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from fuzz.claims import cuts, hold
from pellucid_cli.records import flow_text
from pellucid_proxy import control
from pellucid_proxy.agent.status import NodeStatus, _answer  # what stands behind the socket
from pellucid_proxy.session.via import handshake
from pellucid_proxy.supervisor import handover, messages
from pellucid_proxy.worker_config import WorkerConfig

KINDS: tuple[Any, ...] = (
    control.ToWorker, control.ToAgent, list[control.Series], messages.ToSupervisor, messages.ToAgent, messages.AgentConfig, WorkerConfig,
    handover.ToPredecessor, handover.ToSuccessor,
)  # fmt: skip
_DECODERS = [msgspec.msgpack.Decoder(kind) for kind in KINDS]


def process_messages(data: bytes) -> str:
    """Every message is refused with MsgspecError, or means the same when it is sent on."""
    taken = []
    for decoder in _DECODERS:
        try:
            message = decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            taken.append(str(error)[:24])
            continue
        hold(
            repr(decoder.decode(msgspec.msgpack.encode(message))) == repr(message), message
        )  # repr: a NaN is not itself
        taken.append(type(message).__name__)
    return " ".join(taken)


def via_connect(data: bytes) -> str:
    return _handshake("HTTPConnect", data)


def via_socks5(data: bytes) -> str:
    return _handshake("SOCKS5", data)


def _handshake(protocol: str, data: bytes) -> str:
    """The way is open at the same byte however the answer is cut, and what comes behind it is not lost."""
    whole, cut = (_greeted(protocol, data, places) for places in ([], cuts(data)))
    hold(whole == cut, whole, cut)
    return f"{whole[0]} {len(whole[1])} {whole[2] is None}"


def _greeted(protocol: str, data: bytes, places: list[int]) -> tuple[str, bytes, bytes | None]:
    """open, more or the refusal; what was sent; what came behind the handshake."""
    dialogue = handshake(protocol, "a.example", 443)
    sent, start = b"", 0
    try:
        for end in [*places, len(data)]:
            answer, rest = dialogue.feed(data[start:end])
            sent += answer
            start = end
            while answer:  # it may have answered more than it was asked
                answer, rest = dialogue.feed(b"")
                sent += answer
            if rest is not None:
                rest += data[end:]
                hold(data.endswith(rest), rest)
                return "open", sent, rest
    except ValueError as error:
        return f"refused {type(error).__name__}", sent, None
    return "more", sent, None


_STATUS = NodeStatus(
    version="1", node="n", pid=1, phase="enforcing", revision="r", source="folder", folder="/p", problems=(), workers=(), connections=0,
    groups=0, pods=0, policies=(), scope=(), listen=(), engine_form="uncompiled", uptime_s=0.0, last_apply_s=None, flows=None,
    flows_dropped=0, metrics=None,
)  # fmt: skip


async def _status() -> NodeStatus:
    return _STATUS


def _run(never_waits: Coroutine[Any, Any, bytes]) -> bytes:
    """Its value, without the cost of a loop."""
    try:
        never_waits.send(None)
    except StopIteration as done:
        return bytes(done.value)
    raise AssertionError("it waits for something")


def status_request(data: bytes) -> str:
    """Whatever is asked is answered with a line of JSON: the status, or an error."""
    answer = _run(_answer(data, _status))
    hold(b"\n" not in answer, answer)
    return " ".join(sorted(json.loads(answer)))[:20]


def flow_record(data: bytes) -> str:
    """A line is a record, or ValueError."""
    try:
        text = flow_text(data)
    except ValueError as error:
        return str(error)[:16]
    hold("\n" not in text and "\x1b[2J" not in text, text)
    return "record"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "process_messages": process_messages,
    "via_connect": via_connect,
    "via_socks5": via_socks5,
    "status_request": status_request,
    "flow_record": flow_record,
}
