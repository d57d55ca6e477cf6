"""A step that memory does not suffice for: as much of it as fits, and nobody ends who need not."""

from __future__ import annotations

import pytest
import torch

from models.engine.core import EngineCore
from models.engine.in_flight import InFlight
from models.engine.scheduler import Batch
from tests.unit.engine.harness import (
    Picture,
    alone,
    answers,
    build_core,
    request,
    run_all,
)  # fmt: skip

PICTURES = [Picture(b"\x01", 6), Picture(b"\x02", 6), Picture(b"\x03", 9)]


class Memory:
    """A device that holds so many tokens of a step, and none of a step with a certain picture."""

    def __init__(self, core: EngineCore, *, tokens: int, too_large: Picture | None = None) -> None:
        self._run = core.runner.run
        self._tokens, self._too_large = tokens, too_large
        core.runner.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Batch, in_flight: InFlight | None) -> torch.Tensor:
        pictures = [
            span.image for chunk in batch.chunks for span in chunk.seq.images
            if span.start < chunk.end and chunk.start < span.end
        ]  # fmt: skip
        if batch.num_tokens > self._tokens or self._too_large in pictures:
            raise torch.OutOfMemoryError("pretended")
        return self._run(batch, in_flight)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_full_memory_makes_steps_smaller_and_ends_nobody(
    async_scheduling: bool, tokens: int
) -> None:
    core = build_core(async_scheduling=async_scheduling)
    Memory(core, tokens=tokens)
    reqs = [request(f"r{i}", [4 + i, *range(2, 10 + 7 * i)], max_new_tokens=9) for i in range(4)]
    for req in reqs:
        core.add(req)
    assert answers(run_all(core)) == {req.request_id: alone(req) for req in reqs}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_full_memory_ends_only_what_cannot_fit(async_scheduling: bool) -> None:
    core = build_core(async_scheduling=async_scheduling)
    Memory(core, tokens=16, too_large=PICTURES[2])
    good = [request(f"r{i}", range(2, 12 + i), [(1, PICTURES[0])]) for i in range(3)]
    for req in (good[0], request("large", range(2, 20), [(3, PICTURES[2])]), *good[1:]):
        core.add(req)
    deltas = run_all(core)
    (bad,) = [d for d in deltas if d.error is not None]
    assert bad.request_id == "large" and "memory" in str(bad.error)
    got = answers(deltas)
    assert {req.request_id: got[req.request_id] for req in good} == {
        req.request_id: alone(req) for req in good
    }
