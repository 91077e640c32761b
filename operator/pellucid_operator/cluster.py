"""Requests to the API server by the official client, whose calls wait: to be made in threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from .world import Body, Key, Kind, key_of

MANAGER = "pellucid-operator"
PAGE = 500
PATIENCE_S = (5.0, 60.0)  # to connect, to answer
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
NOT_FOUND, FORBIDDEN = 404, 403


class Refused(Exception):
    """The API server did not do it; the text says what was asked and why not. status: of HTTP, 0 if there was no answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Cluster:
    """writes: how many requests changed something, by kind's plural."""

    def __init__(self) -> None:
        try:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
        except config.ConfigException:
            config.load_kube_config()  # type: ignore[no-untyped-call]
        self._api = client.ApiClient()
        self._lock = threading.Lock()
        self.writes: dict[str, int] = {}

    def listed(self, kind: Kind, namespace: str = "") -> list[Body]:
        """All objects of a kind. Raises Refused."""
        path = f"/{kind.path}/namespaces/{namespace}/{kind.plural}" if namespace else f"/{kind.path}/{kind.plural}"
        found: list[Body] = []
        rest = ""
        while True:
            page = self._call("GET", f"{path}?limit={PAGE}{f'&continue={rest}' if rest else ''}")
            found += page["items"]
            rest = page["metadata"].get("continue") or ""
            if not rest:
                return found

    def get(self, path: str) -> dict[str, Any]:
        """The object at path. Raises Refused."""
        return self._call("GET", path)

    def apply(self, kind: Kind, value: Body) -> None:
        """Server-side apply. Raises Refused."""
        self._count(kind)
        self._call(
            "PATCH", f"{self._path(kind, key_of(kind.name, value))}?fieldManager={MANAGER}&force=true", value, APPLY
        )

    def write_status(self, kind: Kind, key: Key, status: Mapping[str, Any]) -> None:
        """The status is as given; conditions of others in it are gone. Raises Refused."""
        self._count(kind)
        self._call("PATCH", f"{self._path(kind, key)}/status?fieldManager={MANAGER}", {"status": status}, MERGE)

    def delete(self, kind: Kind, key: Key) -> None:
        """It is gone, or was not there. Raises Refused."""
        self._count(kind)
        try:
            self._call("DELETE", self._path(kind, key))
        except Refused as err:
            if err.status != NOT_FOUND:
                raise

    def scale_down(self, namespace: str, deployment: str) -> None:
        """The Deployment wants no pod; none is there already where there is no such Deployment. Raises Refused."""
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}/scale"
        try:
            self._call("PATCH", path, {"spec": {"replicas": 0}}, MERGE)
        except Refused as err:
            if err.status != NOT_FOUND:
                raise

    def warn(self, kind: Kind, namespace: str, about: Body, reason: str, message: str, now: str) -> None:
        """An Event (kind) of type Warning about an object. Raises Refused."""
        self._call("POST", f"/{kind.path}/namespaces/{namespace}/{kind.plural}", {
            "apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": reason, "message": message[:1024],
            "metadata": {"generateName": "pellucid-", "namespace": namespace},
            "involvedObject": {
                "apiVersion": about.get("apiVersion", ""), "kind": about.get("kind", ""), "name": about["metadata"]["name"],
                "namespace": about["metadata"].get("namespace", ""), "uid": about["metadata"].get("uid", ""),
            },
            "source": {"component": MANAGER}, "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        })  # fmt: skip

    def _path(self, kind: Kind, key: Key) -> str:
        _, namespace, name = key
        within = f"namespaces/{namespace}/" if namespace else ""
        return f"/{kind.path}/{within}{kind.plural}/{name}"

    def _count(self, kind: Kind) -> None:
        with self._lock:
            self.writes[kind.plural] = self.writes.get(kind.plural, 0) + 1

    def _call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> dict[str, Any]:
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": MANAGER}
        for each in self._api.configuration.auth_settings().values():  # reads a token that was renewed
            headers[str(each["key"])] = str(each["value"])
        content = body if content_type.endswith("json") else json.dumps(body)  # JSON it writes itself
        url = f"{self._api.configuration.host}{path}"
        try:
            answer = self._api.call_api(method, url, headers, content, _request_timeout=PATIENCE_S)
            status, data = answer.status, bytes(answer.read())  # type: ignore[no-untyped-call]
        except client.ApiException as err:
            status, data = err.status or 0, str(err.body or "").encode()
        except HTTPError as err:
            raise Refused(0, f"{method} {path}: the API server cannot be reached: {err}") from err
        if not 200 <= status < 300:
            raise Refused(status, f"{method} {path}: {status}: {_message(data)}{_cure(status, path)}")
        found: dict[str, Any] = json.loads(data)
        return found


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")[:200]


def _cure(status: int, path: str) -> str:
    if status == FORBIDDEN:
        return "; the chart's ClusterRole pellucid-operator gives the right: install the chart of this version"
    if status == NOT_FOUND and "/pellucid.dev/" in path:
        return "; are the CustomResourceDefinitions of this version there? (crds.install of the chart)"
    return ""
