"""What the cluster is: names, addresses, and each node's files and daemons. Pure.

One control plane and some workers, dual stack. Each is a machine of its own to Kubernetes (node.py), in namespaces of this one. Behind a
router there is an "internet" of a few addresses, where tests run servers:

    cp .1   n1 .11   n2 .12 …      172.31.77.0/24, fd00:77::/64      bridge and router in namespace lan (.254, ::fe)
    pods of nN                     10.244.N.0/24, fd00:10:244:N::/64
    services                       10.96.0.0/16, fd00:10:96::/112
    internet                       203.0.113.1-3, 2001:db8:113::1-3
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LAN4, LAN6 = "172.31.77", "fd00:77:"
POD4, POD6 = "10.244", "fd00:10:244"
SERVICES4, SERVICES6 = "10.96.0.0/16", "fd00:10:96::/112"
INTERNET4, INTERNET6 = "203.0.113", "2001:db8:113:"
INTERNET_HOSTS = (1, 2, 3)
API_PORT = 6443
DNS = "10.96.0.10"
PAUSE_IMAGE = "pellucid.test/pause:1"
CONTROL_PLANE = "cp"
PROXY_MODES = ("nftables", "iptables")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. number: the last part of its addresses; that of its pods' networks is index, 0 for the control plane."""

    name: str
    number: int
    index: int

    @property
    def ipv4(self) -> str:
        return f"{LAN4}.{self.number}"

    @property
    def ipv6(self) -> str:
        return f"{LAN6}:{self.number}"

    @property
    def pods4(self) -> str:
        return f"{POD4}.{self.index}.0/24"

    @property
    def pods6(self) -> str:
        return f"{POD6}:{self.index}::/64"


@dataclass(frozen=True)
class Plan:
    """prefix: of the network namespaces' names, so that two clusters fit on one machine. folder: of everything that is written.

    programs: where programs.built() put them. proxy_mode: kube-proxy's."""

    prefix: str
    folder: Path
    programs: Path
    workers: int = 2
    proxy_mode: str = "nftables"

    @property
    def control_plane(self) -> Node:
        return Node(CONTROL_PLANE, 1, 0)

    @property
    def worker_nodes(self) -> list[Node]:
        return [Node(f"n{index}", 10 + index, index) for index in range(1, self.workers + 1)]

    @property
    def nodes(self) -> list[Node]:
        return [self.control_plane, *self.worker_nodes]

    def namespace(self, name: str) -> str:
        """The name of a network namespace: of a node, or lan, or internet."""
        return f"{self.prefix}-{name}"

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def logs(self) -> Path:
        return self.folder / "log"

    def own(self, node: Node) -> Path:
        """Where a node's disk is."""
        return self.folder / node.name

    @property
    def kubeconfig(self) -> Path:
        return self.pki / "admin.conf"


def kubeconfig(pki: Path, user: str) -> str:
    """JSON, which is YAML too."""
    cluster = {"server": f"https://{LAN4}.1:{API_PORT}", "certificate-authority": str(pki / "ca.crt")}
    credentials = {"client-certificate": str(pki / f"{user}.crt"), "client-key": str(pki / f"{user}.key")}
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "e2e",
        "clusters": [{"name": "e2e", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
    })  # fmt: skip


def spec(plan: Plan, node: Node) -> dict[str, object]:
    """What node.py makes of a node: files, by path, as the node sees them; daemons, by name: their command lines, started in this order."""
    files, daemons = _worker(plan, node) if node.index else ({}, _control_plane(plan))
    hosts = [f"127.0.0.1 localhost {node.name}", "::1 localhost", *(f"{each.ipv4} {each.name}" for each in plan.nodes)]
    files |= {
        "/etc/hostname": f"{node.name}\n",
        "/etc/hosts": "\n".join(hosts) + "\n",
        "/etc/resolv.conf": f"nameserver {INTERNET4}.1\n",
    }
    return {
        "name": node.name,
        "disk": str(plan.own(node)),
        "logs": str(plan.logs),
        "worker": bool(node.index),
        "files": files,
        "daemons": daemons,
    }


def _control_plane(plan: Plan) -> dict[str, list[str]]:
    pki, here = plan.pki, plan.own(plan.control_plane)
    program = plan.programs.joinpath

    def of(name: str, **flags: str) -> list[str]:
        return [str(program(name)), *(f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items())]

    def asks(user: str) -> dict[str, str]:
        file = str(pki / f"{user}.conf")
        return {"kubeconfig": file, "authentication_kubeconfig": file, "authorization_kubeconfig": file}

    return {
        "etcd": of(
            "etcd",
            data_dir=f"{here}/etcd",
            listen_client_urls="http://127.0.0.1:2379",
            advertise_client_urls="http://127.0.0.1:2379",
            listen_peer_urls="http://127.0.0.1:2380",
            unsafe_no_fsync="true",  # it is thrown away
            log_level="warn",
        ),
        "apiserver": of(
            "kube-apiserver",
            etcd_servers="http://127.0.0.1:2379",
            bind_address="::",
            advertise_address=plan.control_plane.ipv4,
            secure_port=str(API_PORT),
            service_cluster_ip_range=f"{SERVICES4},{SERVICES6}",
            tls_cert_file=f"{pki}/api.crt",
            tls_private_key_file=f"{pki}/api.key",
            client_ca_file=f"{pki}/ca.crt",
            authorization_mode="Node,RBAC",
            enable_admission_plugins="NodeRestriction",
            allow_privileged="true",
            service_account_issuer="https://kubernetes.default.svc.cluster.local",
            service_account_signing_key_file=f"{pki}/sa.key",
            service_account_key_file=f"{pki}/sa.pub",
            kubelet_client_certificate=f"{pki}/api-kubelet.crt",
            kubelet_client_key=f"{pki}/api-kubelet.key",
            kubelet_certificate_authority=f"{pki}/ca.crt",
            kubelet_preferred_address_types="InternalIP",
            requestheader_client_ca_file=f"{pki}/front-ca.crt",
            requestheader_allowed_names="front-proxy-client",
            requestheader_username_headers="X-Remote-User",
            requestheader_group_headers="X-Remote-Group",
            requestheader_extra_headers_prefix="X-Remote-Extra-",
            proxy_client_cert_file=f"{pki}/front.crt",
            proxy_client_key_file=f"{pki}/front.key",
            enable_aggregator_routing="true",  # webhooks reach pods without a kube-proxy here
            profiling="false",
        ),
        "controller-manager": of(
            "kube-controller-manager",
            **asks("controller-manager"),
            service_account_private_key_file=f"{pki}/sa.key",
            root_ca_file=f"{pki}/ca.crt",
            use_service_account_credentials="true",
            leader_elect="false",
            cluster_signing_cert_file=f"{pki}/ca.crt",
            cluster_signing_key_file=f"{pki}/ca.key",
            service_cluster_ip_range=f"{SERVICES4},{SERVICES6}",
            node_monitor_period="2s",
            node_monitor_grace_period="20s",
            flex_volume_plugin_dir="/var/lib/flexvolume",
            profiling="false",
        ),
        "scheduler": of("kube-scheduler", **asks("scheduler"), leader_elect="false", profiling="false"),
    }


def _worker(plan: Plan, node: Node) -> tuple[dict[str, str], dict[str, list[str]]]:
    program, pki = plan.programs.joinpath, plan.pki
    files = {
        "/etc/containerd/config.toml": _containerd(plan),
        "/etc/cni/net.d/10-ptp.conflist": json.dumps(_cni(node)),
        "/etc/kubelet.yaml": json.dumps(_kubelet(plan, node)),
        "/etc/kube-proxy.yaml": json.dumps(_kube_proxy(plan, node)),
    }
    daemons = {
        "containerd": [str(program("containerd")), "--config=/etc/containerd/config.toml"],
        "kube-proxy": [str(program("kube-proxy")), "--config=/etc/kube-proxy.yaml"],
        "kubelet": [
            str(program("kubelet")),
            "--config=/etc/kubelet.yaml",
            f"--kubeconfig={pki}/{node.name}.conf",
            f"--hostname-override={node.name}",
            f"--node-ip={node.ipv4},{node.ipv6}",
            "--root-dir=/var/lib/kubelet",
        ],
    }
    return files, daemons


def _containerd(plan: Plan) -> str:
    return f"""version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    runtime_path = "{plan.programs}/containerd-shim-runc-v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
"""


def _cni(node: Node) -> dict[str, object]:
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni-ipam",
        "ranges": [[{"subnet": node.pods4}], [{"subnet": node.pods6}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    plugins = [{"type": "ptp", "mtu": 1500, "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": True}}]
    return {"cniVersion": "1.0.0", "name": "ptp", "plugins": plugins}


def cgroup(plan: Plan, node: Node) -> str:
    """The node's part of each cgroup hierarchy."""
    return f"/{plan.namespace(node.name)}"


def _kubelet(plan: Plan, node: Node) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup(plan, node),
        "enforceNodeAllocatable": ["pods"],
        "failSwapOn": False,
        "oomScoreAdj": 0,  # to lower it takes a right that not every machine gives
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True, "cacheTTL": "10s"},
            "x509": {"clientCAFile": f"{plan.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{plan.pki}/{node.name}-serving.crt",
        "tlsPrivateKeyFile": f"{plan.pki}/{node.name}-serving.key",
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "evictionHard": {
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "memory.available": "50Mi",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "nodeStatusUpdateFrequency": "4s",
        "registerNode": True,
    }


def _kube_proxy(plan: Plan, node: Node) -> dict[str, object]:
    untouched = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": plan.proxy_mode,
        "hostnameOverride": node.name,
        "clientConnection": {"kubeconfig": f"{plan.pki}/kube-proxy.conf"},
        "clusterCIDR": f"{POD4}.0.0/16,{POD6}::/48",
        "conntrack": untouched,
        plan.proxy_mode: {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
        "oomScoreAdj": 0,
    }
