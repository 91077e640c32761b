"""Certificates of the cluster's components, made by openssl: thrown away with the cluster, good for 30 days."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .plan import LAN4, Plan, kubeconfig

DAYS = "30"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Leaf(NamedTuple):
    """subject: the user that it is to the API server. names: as in subjectAltName. file: it gets a kubeconfig of its own."""

    name: str
    subject: str
    authority: str = "ca"
    names: str = ""
    file: bool = False


def leaves(plan: Plan) -> Iterator[Leaf]:
    services = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    api = ["IP:10.96.0.1", "IP:fd00:10:96::1", f"IP:{LAN4}.1", "IP:127.0.0.1", "DNS:localhost"]
    yield Leaf("api", "/CN=kube-apiserver", names=",".join([*api, *(f"DNS:{each}" for each in services)]))
    yield Leaf("api-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    yield Leaf("front", "/CN=front-proxy-client", "front-ca")
    yield Leaf("admin", "/O=system:masters/CN=admin", file=True)
    yield Leaf("controller-manager", "/CN=system:kube-controller-manager", file=True)
    yield Leaf("scheduler", "/CN=system:kube-scheduler", file=True)
    yield Leaf("kube-proxy", "/CN=system:kube-proxy", file=True)
    for node in plan.worker_nodes:
        yield Leaf(node.name, f"/O=system:nodes/CN=system:node:{node.name}", file=True)
        yield Leaf(f"{node.name}-serving", f"/CN={node.name}", names=f"DNS:{node.name},IP:{node.ipv4},IP:{node.ipv6}")


def make(plan: Plan) -> None:
    """plan.pki holds everything, readable by its owner alone; what was there before is kept."""
    folder = plan.pki
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for authority in ("ca", "front-ca"):
        if not (folder / f"{authority}.crt").exists():
            subject = ("-subj", f"/CN={authority}", "-days", DAYS)
            _openssl(folder, "req", "-x509", *_KEY, "-keyout", f"{authority}.key", "-out", f"{authority}.crt", *subject)
    if not (folder / "sa.pub").exists():
        _openssl(folder, "genrsa", "-out", "sa.key", "2048")
        _openssl(folder, "rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    for leaf in leaves(plan):
        if not (folder / f"{leaf.name}.crt").exists():
            _issue(folder, leaf)
        if leaf.file:
            (folder / f"{leaf.name}.conf").write_text(kubeconfig(folder, leaf.name))


def _issue(folder: Path, leaf: Leaf) -> None:
    extensions = "extendedKeyUsage=clientAuth,serverAuth\n" + (f"subjectAltName={leaf.names}\n" if leaf.names else "")
    (folder / "extensions").write_text(extensions)
    _openssl(folder, "req", *_KEY, "-keyout", f"{leaf.name}.key", "-out", "request", "-subj", leaf.subject)
    by = ("-CA", f"{leaf.authority}.crt", "-CAkey", f"{leaf.authority}.key", "-CAcreateserial", "-days", DAYS)
    _openssl(folder, "x509", "-req", "-in", "request", *by, "-extfile", "extensions", "-out", f"{leaf.name}.crt.new")
    os.replace(folder / f"{leaf.name}.crt.new", folder / f"{leaf.name}.crt")


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {' '.join(arguments)}: {done.stderr.strip()}")
