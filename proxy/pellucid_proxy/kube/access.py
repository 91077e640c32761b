"""Where the API server is and who asks; and what it is when it cannot be asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


class ApiError(Exception):
    """A request failed. status: of HTTP, 0 if there was no answer. The text says what and, where it is known, the cure."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Access:
    """url: https://HOST:PORT. token_file: read again for each request, for tokens are renewed; "": none. ca_file: "": the system's."""

    url: str
    token_file: str = ""
    ca_file: str = ""


def in_cluster(environment: Mapping[str, str] = os.environ) -> Access:
    """What a pod is given. Raises ApiError outside a cluster."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise ApiError(0, "KUBERNETES_SERVICE_HOST is not set: this is no pod; run it in one, or give --policy DIR")
    return Access(f"https://{f'[{host}]' if ':' in host else host}:{port}", f"{ACCOUNT}/token", f"{ACCOUNT}/ca.crt")
