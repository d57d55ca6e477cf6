"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.comparison import Results

ENGINE, TRANSFORMERS, BATCHED = "engine", "transformers", "transformers, batched"
HTTP = {
    "launcher": "HTTP, launcher", "serve run": "HTTP, serve run", "make serve": "HTTP, make serve",
}  # fmt: skip
MANY = 8
MEMORY_GB = {"launcher": 2.5, "serve run": 3.5, "make serve": 3.5}


@dataclass(frozen=True)
class Goal:
    """
    Attributes:
        unit: of value and limit; "" for a ratio.
        least: the value must be at least the limit, otherwise at most.
    """

    text: str
    value: float
    limit: float
    unit: str = ""
    least: bool = False

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        mark = "met   " if self.is_met else "MISSED"
        bound = "at least" if self.least else "at most"
        return (
            f"{mark} {self.text}: {self.value:.3g}{self.unit} ({bound} {self.limit:g}{self.unit})"
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "value": round(self.value, 4), "is_met": self.is_met}


def goals_of(results: Results) -> Iterator[Goal]:
    """Those that the arms and numbers of streams of these results can tell."""
    arms, streams = results.arms, results.plan.streams
    if ENGINE in arms and TRANSFORMERS in arms and 1 in streams:
        yield Goal(
            "one stream, engine / transformers, tokens/s",
            results.ratio(ENGINE, TRANSFORMERS, 1), 1.0, least=True,
        )  # fmt: skip
    if ENGINE in arms and 1 in streams and MANY in streams:
        yield Goal(
            f"engine, {MANY} streams / one stream, tokens/s",
            results.growth(ENGINE, MANY), 3.0, least=True,
        )  # fmt: skip
    for http in HTTP.values():
        if http in arms and ENGINE in arms and MANY in streams:
            yield Goal(
                f"{MANY} streams, {http} / engine, tokens/s",
                results.ratio(http, ENGINE, MANY), 0.9, least=True,
            )  # fmt: skip
            waited = results.median(http, MANY, "wait_p99_s") * 1000
            yield Goal(f"{MANY} streams, {http}, 99 % of tokens waited", waited, 50.0, " ms")
        if http in arms and ENGINE in arms and 1 in streams:
            yield Goal(
                f"one stream, first token, {http} - engine",
                _later_ms(results, http), 10.0, " ms",
            )  # fmt: skip


def start_goal(way: str, seconds: float) -> Goal:
    return Goal(f"{way}: from the command to the first streamed token", seconds, 40.0, " s")


def memory_goal(way: str, num_bytes: int) -> Goal:
    return Goal(f"{way}: memory of all processes (PSS)", num_bytes / 1e9, MEMORY_GB[way], " GB")


def _later_ms(results: Results, http: str) -> float:
    return 1000 * (
        results.median(http, 1, "first_token_s") - results.median(ENGINE, 1, "first_token_s")
    )
