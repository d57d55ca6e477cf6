"""How many generations a replica lets in.

Ray Serve's `max_ongoing_requests` bounds everything that a replica holds: running, waiting, still
uploading, control calls. A replica at that bound answers no `/worker_get_status`, and controllers
drop workers that do not answer. So the door closes earlier, and leaves a reserve:

    max_ongoing_requests = generations (running + waiting) + reserve (uploads, control calls)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.errors import ConfigurationError, EngineOverloaded

RESERVE = 16


def max_ongoing_requests(max_num_seqs: int, max_waiting: int) -> int:
    """The default: so many that the door never has to shrink."""
    return max_num_seqs + max_waiting + RESERVE


def capacity(max_ongoing: int) -> int:
    """How many generations fit under a `max_ongoing_requests`; below 1 it is too small to work."""
    reserve = min(RESERVE, max(2, max_ongoing // 4))
    return max_ongoing - reserve


def shrink(max_ongoing: int, max_num_seqs: int, max_waiting: int) -> tuple[int, int]:
    """(max_num_seqs, max_waiting) that fit: first fewer wait, then fewer run.

    Raises:
        ConfigurationError: not even one generation fits.
    """
    room = capacity(max_ongoing)
    if room < 1:
        raise ConfigurationError(
            f"max_ongoing_requests is {max_ongoing}, which leaves no room for a generation beside "
            f"status and health calls; it must be at least 3, and "
            f"{max_ongoing_requests(max_num_seqs, max_waiting)} for max_num_seqs {max_num_seqs} "
            f"and max_waiting {max_waiting}"
        )
    max_num_seqs = min(max_num_seqs, room)
    return max_num_seqs, min(max_waiting, room - max_num_seqs)


class Door:
    """Counts generations from the end of their upload to their end. One event loop only."""

    def __init__(
        self,
        max_num_seqs: int,
        max_waiting: int,
        live_max_ongoing: Callable[[], int],
    ) -> None:
        """
        Args:
            live_max_ongoing: `max_ongoing_requests` as it is now; it may change while serving.
        """
        self.on_change: Callable[[], None] = lambda: None
        """Called after `count` has changed."""
        self.is_closed = False
        self._limit = max_num_seqs + max_waiting
        self._live_max_ongoing = live_max_ongoing
        self._inside = 0
        self._uploading = 0

    @property
    def count(self) -> int:
        """Generations inside: running, waiting, or getting ready."""
        return self._inside

    @property
    def limit(self) -> int:
        return min(self._limit, max(1, capacity(self._live_max_ongoing())))

    def close(self) -> None:
        """Lets nobody in any more; those who are inside stay until they are done."""
        self.is_closed = True

    def _check_open(self) -> None:
        if self.is_closed:
            raise EngineOverloaded("the server is shutting down; try again in a moment")

    @contextmanager
    def enter(self, places: int = 1) -> Iterator[None]:
        """A generation's stay, or that of so many that belong to one request: all or none.

        Raises:
            EngineOverloaded: full, or closed.
        """
        self._check_open()
        if self._inside + places > self.limit:
            raise EngineOverloaded(
                f"the server is full ({self._inside} requests are running or waiting); "
                "try again in a moment"
            )
        self._inside += places
        self.on_change()
        try:
            yield
        finally:
            self._inside -= places
            self.on_change()

    @contextmanager
    def upload(self) -> Iterator[None]:
        """A body's arrival; half of the reserve stays free of them.

        Raises:
            EngineOverloaded: too many bodies are on their way, or closed.
        """
        self._check_open()
        max_ongoing = self._live_max_ongoing()
        kept_free = max(1, (max_ongoing - capacity(max_ongoing)) // 2)
        if self._inside + self._uploading >= max_ongoing - kept_free:
            raise EngineOverloaded(
                f"the server is full ({self._inside} requests inside, {self._uploading} being "
                "uploaded); try again in a moment"
            )
        self._uploading += 1
        try:
            yield
        finally:
            self._uploading -= 1
