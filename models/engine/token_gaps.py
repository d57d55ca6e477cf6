"""How long requests waited between two of their tokens, as a histogram."""

from __future__ import annotations

from bisect import bisect_left

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
"""Upper bounds, inclusive; those of vLLM's histogram of the same meaning, and finer ones."""


class TokenGaps:
    """One entry for each step, not for each token: all requests of a step get their tokens at
    once. Where one of them has waited longer than the others, it is the one that counts."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries up to each of BOUNDS_S and above the one before; in the end, those above all."""
        return tuple(self._counts)
