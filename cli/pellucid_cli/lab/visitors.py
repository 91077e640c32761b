"""A little traffic of everyday kinds, for a lab that somebody looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from msgspec import UNSET

from pellucid_policy.model import Policy
from pellucid_policy.objects import Objects

from .clients import get, get_tls, greet
from .scene import METADATA, Scene
from .topology import Pod

MAX_NAMES = 20
PAUSE_S = 0.25


def names_in(objects: Objects) -> list[str]:
    """Names that the policies' rules speak of, so that every rule has a chance to match; www.example.com first."""
    policies: tuple[Policy, ...] = (*objects.cluster_policies, *objects.policies)
    found = (
        destination.domain.replace("*.", "lab.")
        for policy in policies
        for rule in policy.spec.rules
        for destination in (rule.match.destinations or ())
        if destination.domain is not UNSET
    )
    return list(dict.fromkeys(["www.example.com", *found]))[:MAX_NAMES]


class Visitors:
    """From entering to leaving the context every pod of the scene visits every name and server, one after the other, slowly."""

    def __init__(self, scene: Scene, names: Sequence[str]) -> None:
        self._scene = scene
        self._names = names
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="visitors", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for visit in self._visits():
                if self._stop.is_set():
                    return
                visit()
                self._stop.wait(PAUSE_S)

    def _visits(self) -> Iterator[Callable[[], object]]:
        web, mail = self._scene.server("web"), self._scene.server("mail")
        pods = list(self._scene.topology.pods.values())
        for name in self._names:
            for pod in pods:
                yield lambda pod=pod, name=name: get_tls(pod, _towards(pod, web.ipv4, web.ipv6), 443, name)  # type: ignore[misc]
                yield lambda pod=pod, name=name: get(pod, _towards(pod, web.ipv4, web.ipv6), 80, name)  # type: ignore[misc]
        for pod in pods:
            yield lambda pod=pod: greet(pod, _towards(pod, mail.ipv4, mail.ipv6), 25)  # type: ignore[misc]
            yield lambda pod=pod: get(pod, METADATA, 80, METADATA)  # type: ignore[misc]


def _towards(pod: Pod, ipv4: str, ipv6: str) -> str:
    """The server's address of a family that the pod has."""
    return ipv4 if any(":" not in address for address in pod.addresses) else ipv6
