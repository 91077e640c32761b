"""nginx has no "listen ... transparent": give it an IP_TRANSPARENT listener through its own variable for inherited sockets."""

import os
import socket
import sys

IP_TRANSPARENT = 19

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
listener.bind(("0.0.0.0", 15001))
listener.listen(8192)
listener.setblocking(False)
listener.set_inheritable(True)
os.environ["NGINX"] = f"{listener.fileno()};"
os.execvp(
    "nginx", ["nginx", "-e", "stderr", "-c", sys.argv[1], "-g", f"worker_processes {os.environ['BENCH_WORKERS']};"]
)
