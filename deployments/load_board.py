"""Who of an application's replicas is alive, and how much each holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ApplicationLoad(NamedTuple):
    """What a replica is told when it reports.

    Attributes:
        queue_length: requests running and waiting, over all replicas.
        replicas: how many have reported lately, at least one.
    """

    queue_length: int
    replicas: int


@dataclass(frozen=True)
class _Report:
    queue_length: int
    at: float


class LoadBoard:
    """The latest report of each replica. One that has gone silent is forgotten: it was killed."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._reports: dict[str, _Report] = {}

    def report(self, replica_id: str, queue_length: int, now: float) -> None:
        self._reports[replica_id] = _Report(queue_length, now)

    def leave(self, replica_id: str) -> None:
        """The replica is being shut down on purpose."""
        self._reports.pop(replica_id, None)

    def load(self, now: float) -> ApplicationLoad:
        alive = [r for r in self._reports.values() if now - r.at <= self._silence_s]
        return ApplicationLoad(sum(r.queue_length for r in alive), len(alive))
