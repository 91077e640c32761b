"""What is left in the kernel when a run ends otherwise than in order."""

from __future__ import annotations


def what_stays(enforced: bool) -> str:
    """For the log, with the cure. enforced: whether the run came to enforce its policy."""
    if not enforced:
        return "it was not enforcing yet; rules that it had made stay until `pellucid run` or `nft delete table inet pellucid`"
    return (
        "stopping. The kernel rules stay: pods with failureMode Closed are refused, all others pass without policy. "
        "Cure: start `pellucid run` again; to give up the rules instead, `nft delete table inet pellucid`"
    )
