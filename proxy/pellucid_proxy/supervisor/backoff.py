"""When a process that ended is started again."""

from __future__ import annotations

from collections import deque

AT_ONCE = 5
"""Ends within WINDOW_S after which the next start waits."""
WINDOW_S = 60.0
FIRST_S, LONGEST_S = 0.2, 10.0


class Backoff:
    """One process. A crash now and then costs nobody a wait; one that cannot live is not tried without end at full speed.

    at_once: ends within WINDOW_S after which the next start waits."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self.ends = 0
        self._at_once = at_once
        self._recent: deque[float] = deque(maxlen=at_once + 10)

    def ended(self, now: float) -> float:
        """It ended at now (monotonic seconds). Returns how many seconds to wait until it is started again."""
        self.ends += 1
        self._recent.append(now)
        while self._recent[0] < now - WINDOW_S:
            self._recent.popleft()
        over = len(self._recent) - self._at_once
        return 0.0 if over <= 0 else min(FIRST_S * 2.0 ** (over - 1), LONGEST_S)
