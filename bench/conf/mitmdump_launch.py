"""mitmdump cannot listen for TPROXY and asks for SO_ORIGINAL_DST; this adds both, and the policy as an addon."""

import socket
import sys
from pathlib import Path

from mitmproxy import addons, platform
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.tls import parse_client_hello, starts_like_tls_record
from mitmproxy.tools.main import mitmdump

IP_TRANSPARENT = 19
LINES = (line.split() for line in Path("/run/bench/names").read_text().splitlines())
BLOCKED = {name for name, verdict in LINES if verdict == "1"}
plain_bind = socket.socket.bind


def bind(self, address):
    if self.family == socket.AF_INET and self.type == socket.SOCK_STREAM:
        self.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    return plain_bind(self, address)


def is_blocked(name):
    labels = name.lower().rstrip(".").split(".")
    return ".".join(labels) in BLOCKED or any("." + ".".join(labels[i:]) in BLOCKED for i in range(1, len(labels)))


class Reject(layer.Layer):
    def _handle_event(self, event):
        if isinstance(event, events.Start):
            yield commands.CloseConnection(self.context.client)


class Policy:
    def next_layer(self, nextlayer):
        data = nextlayer.data_client()
        if starts_like_tls_record(data):
            hello = parse_client_hello(data)
            if hello and hello.sni and is_blocked(hello.sni):
                nextlayer.layer = Reject(nextlayer.context)


socket.socket.bind = bind
platform.original_addr = lambda client: client.getsockname()[:2]
platform.init_transparent_mode = lambda: None
default_addons = addons.default_addons
addons.default_addons = lambda: [*default_addons(), Policy()]
sys.exit(mitmdump())
