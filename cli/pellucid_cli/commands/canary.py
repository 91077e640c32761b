"""`pellucid canary`. On every node of a cluster, all the time: nothing is imported that it does not need."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time

import click

ANSWERED, SILENT = 0, 1
ADDRESSES = ("192.0.2.119", "2001:db8::77")
"""settings.NodeSettings.canary; a test holds them equal."""
PORT = 80
MAX_ANSWER = 4096


@click.command(name="canary")
@click.option("--once", is_flag=True, help="Ask once, and say what came of it.")
@click.option(
    "--every", type=click.FloatRange(0.1), default=5.0, show_default=True, metavar="SECONDS", help="How often to ask."
)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="SECONDS", help="For an answer."
)
@click.option(
    "--address",
    multiple=True,
    metavar="ADDRESS",
    help="Ask there. [default: the reserved addresses of the families that this pod has]",
)
@click.pass_context
def command(ctx: click.Context, once: bool, every: float, timeout: float, address: tuple[str, ...]) -> None:
    """Ask an address that only Pellucid answers: are this pod's connections intercepted?

    The addresses are nobody's (RFC 5737, RFC 3849). A worker of the node answers there, whatever policies say, and the node tells by that
    whether interception works (condition InterceptionVerified). Prints a line when the outcome changes.

    \b
    pellucid canary --once
    pellucid canary --every 5          # as the pods of the DaemonSet pellucid-canary

    \b
    Exit status: 0 answered, or stopped by a signal, 1 not answered (--once)
    """
    asked = address or tuple(each for each in ADDRESSES if _has_family(each))
    if once:
        outcomes = {each: ask(each, timeout) for each in asked}
        for each, (_, said) in outcomes.items():
            click.echo(f"{each}: {said}")
        ctx.exit(ANSWERED if outcomes and all(answered for answered, _ in outcomes.values()) else SILENT)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    before: dict[str, bool] = {}
    while True:
        for each in asked:
            answered, said = ask(each, timeout)
            if before.get(each) != answered:
                before[each] = answered
                _tell(each, answered, said)
        if stop.wait(every):
            return


def ask(address: str, timeout_s: float) -> tuple[bool, str]:
    """Whether a worker answers there, and its words, or why not."""
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((address, PORT), timeout_s) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: canary\r\nConnection: close\r\n\r\n")
            answer = b""
            while len(answer) < MAX_ANSWER and (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                more = connection.recv(MAX_ANSWER)
                if not more:
                    break
                answer += more
    except OSError as err:
        return False, str(err) or type(err).__name__
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return False, "somebody answers who is not Pellucid" if answer else "no answer"
    revision, _, node = body.decode(errors="replace").strip().partition(" ")
    return True, f"revision {revision} on {node}"


def _tell(address: str, answered: bool, said: str) -> None:
    if sys.stdout.isatty():
        click.secho(f"{address}: {said}", fg="green" if answered else "red")
    else:
        click.echo(json.dumps({"address": address, "answered": answered, "said": said}))
    sys.stdout.flush()


def _has_family(address: str) -> bool:
    """Whether this pod has a way there at all."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, PORT))  # sends nothing
    except OSError:
        return False
    return True
