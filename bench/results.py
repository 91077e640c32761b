"""What bench.run printed, read back: repetitions pooled by scenario and contender, medians, ratios and how sure they are."""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import table
from bench.scenarios import Figure

PEERS = frozenset(name for name, contender in table("").items() if contender.peer)
PRODUCT = "pellucid"
RESAMPLES = 2000
Result = dict[str, Any]


@dataclass
class Results:
    """Of the tries of a repetition the quietest counts."""

    scenarios: dict[str, dict[str, list[Result]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    errors: list[Result] = field(default_factory=list)
    machines: list[Result] = field(default_factory=list)

    def of(self, scenario: str, contender: str, alongside: Iterable[str] = ()) -> list[Result]:
        """The repetitions of a contender, from runs only in which one of `alongside` was measured too, if any is given."""
        found = self.scenarios.get(scenario, {})
        runs = {result["run"] for other in alongside for result in found.get(other, [])}
        return [result for result in found.get(contender, []) if not alongside or result["run"] in runs]

    def contenders(self, scenario: str) -> dict[str, list[Result]]:
        """All contenders of a scenario, never to be compared across runs.

        Where Pellucid and peers were measured, only runs with both count; if there is none, the peers are left out."""
        found = self.scenarios.get(scenario, {})
        own = {result["run"] for result in found.get(PRODUCT, [])}
        peers = {result["run"] for name in PEERS & found.keys() for result in found[name]}
        if not own or not peers:
            return dict(found)
        kept = own & peers or own
        chosen = {name: [result for result in results if result["run"] in kept] for name, results in found.items()}
        return {name: results for name, results in chosen.items() if results}


def load(paths: Iterable[Path], *, quiet_only: bool = False) -> Results:
    """Read files of bench.run; quiet_only leaves out what stayed noisy after all tries."""
    loaded = Results()
    best: dict[tuple[str, str, str, int], Result] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if "machine" in result:
                loaded.machines.append(result)
            elif "error" in result:
                loaded.errors.append(result)
            else:
                key = (result["run"], result["scenario"], result["contender"], result["repetition"])
                if key not in best or result["foreign"] < best[key]["foreign"]:
                    best[key] = result
    for (_, scenario, contender, _), result in best.items():
        if not (quiet_only and result["noisy"]):
            loaded.scenarios[scenario][contender].append(result)
    return loaded


def values(results: Iterable[Result], key: str) -> list[float]:
    return [result[key] for result in results if result.get(key) is not None]


def median(results: Iterable[Result], key: str) -> float | None:
    found = values(results, key)
    return statistics.median(found) if found else None


def best_peer(contenders: dict[str, list[Result]], figure: Figure) -> str | None:
    """The peer with the best median, or None if no peer has one."""
    medians = {name: median(results, figure.key) for name, results in contenders.items() if name in PEERS}
    known = {name: value for name, value in medians.items() if value}
    pick = max if figure.higher_is_better else min
    return pick(known, key=known.__getitem__) if known else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def ratio_interval(results: list[Result], base: list[Result], key: str) -> tuple[float, float] | None:
    """The 5th and the 95th percentile of the ratio of medians over resampled repetitions; None for fewer than three of either."""
    own, others = values(results, key), values(base, key)
    if min(len(own), len(others)) < 3 or not all(others):
        return None
    source = random.Random(0)
    ratios = sorted(
        statistics.median(source.choices(own, k=len(own))) / statistics.median(source.choices(others, k=len(others)))
        for _ in range(RESAMPLES)
    )
    return ratios[RESAMPLES // 20], ratios[-RESAMPLES // 20]
