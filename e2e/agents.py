"""Many nodes' agents at once, as far as the API server sees them: each watches snapshots, and tells its revision.

python3 -m e2e.agents URL TOKEN_FILE CA_FILE COUNT

A line on standard input names a revision. It is answered when every agent has it, by a line of JSON: what came and went since the last one.
Runs where the API server can be reached.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET

from pellucid_policy.installation import SnapshotSpec
from pellucid_policy.meta import API_VERSION
from pellucid_policy.snapshot import INDEX_NAME
from pellucid_proxy.agent.source_cluster import SNAPSHOTS, kept_snapshot
from pellucid_proxy.kube import client as client_module
from pellucid_proxy.kube.access import Access, ApiError
from pellucid_proxy.kube.client import Client
from pellucid_proxy.kube.reflector import Reflector

PATIENCE_S = 60.0
counted = {"bytes": 0, "writes": 0}


def _counting(decode: Any) -> Any:
    def decoded(path: str, data: bytes) -> dict[str, Any]:
        counted["bytes"] += len(data)
        found: dict[str, Any] = decode(path, data)
        return found

    return decoded


class Agent:
    """One node. revision: of the last index whose pieces were all there."""

    def __init__(self, access: Access, number: int) -> None:
        self.revision = ""
        self.changed = asyncio.Event()
        self._name = f"simulated-{number}"
        self._client = Client(access)
        self._reflector = Reflector(self._client, SNAPSHOTS, kept_snapshot, self.changed.set)

    async def run(self) -> None:
        async with self._client, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reflector.run())
            tasks.create_task(self._tell())

    async def _tell(self) -> None:
        path = f"/apis/{API_VERSION}/transparentnodes/{self._name}"
        made: Mapping[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": "TransparentNode",
            "metadata": {"name": self._name},
        }
        await self._client.apply(path, made, "simulated")
        while True:
            await self.changed.wait()
            self.changed.clear()
            found = self._reflector.objects
            current = found.get(("", INDEX_NAME))
            if not isinstance(current, SnapshotSpec) or current.index is UNSET:
                continue
            index = current.index
            if index.revision != self.revision and all(("", piece) in found for piece in index.pieces):
                self.revision = index.revision
                counted["writes"] += 1
                try:
                    await self._client.apply(
                        f"{path}/status", {**made, "status": {"revision": index.revision}}, "simulated"
                    )
                except ApiError as err:
                    print(err, file=sys.stderr)


async def main() -> None:
    url, token, ca, count = sys.argv[1:]
    client_module._decoded = _counting(client_module._decoded)  # noqa: SLF001  # what a real agent would have received
    agents = [Agent(Access(url, token, ca), number) for number in range(int(count))]
    tasks = [asyncio.create_task(each.run()) for each in agents]
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        wanted, began = line.decode().strip(), asyncio.get_running_loop().time()
        async with asyncio.timeout(PATIENCE_S):
            while not all(each.revision == wanted for each in agents):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # between two looks
        print(json.dumps({**counted, "seconds": asyncio.get_running_loop().time() - began}), flush=True)
        counted.update(bytes=0, writes=0)
    for each in tasks:
        each.cancel()


if __name__ == "__main__":
    asyncio.run(main())
