"""What the engine counts and times, and what each figure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from PIL import Image

from models import Engine, SamplingParams, load_engine
from models.engine.core import EngineCore
from models.engine.messages import FinishedRequest, GenerationDelta, GenerationRequest, Timing
from models.engine.token_gaps import BOUNDS_S, TokenGaps
from models.errors import RequestTimeout
from tests.tiny import write_tiny_llava
from tests.unit.engine.harness import BLOCK, Picture, build_core, request, run_all

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
PICTURE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
A, B = Picture(b"a", 3), Picture(b"b", 2)


def run(core: EngineCore, *reqs: GenerationRequest) -> dict[str, list[GenerationDelta]]:
    for req in reqs:
        core.add(req)
    deltas = run_all(core)
    return {r.request_id: [d for d in deltas if d.request_id == r.request_id] for r in reqs}


def test_tokens_in_and_out_are_counted_once_whatever_is_computed_twice() -> None:
    """Preempted requests are computed again, which is nothing that their senders asked for."""
    core = build_core(blocks=20, seqs=4, budget=16, caching=False)
    reqs = [request(f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, ignore_eos=True)
            for i in range(4)]  # fmt: skip
    run(core, *reqs)
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (4 * 20, 4 * 25)


def test_a_prompt_counts_with_its_first_token_and_not_before() -> None:
    core = build_core(budget=4)
    core.add(request("r", range(2, 12), ignore_eos=True))
    core.step()
    assert core.stats().num_prompt_tokens == core.stats().num_generated_tokens == 0
    core.step()
    core.step()
    assert (core.stats().num_prompt_tokens, core.stats().num_generated_tokens) == (10, 1)


def test_the_prefix_cache_is_asked_for_all_tokens_and_has_full_blocks() -> None:
    core = build_core(budget=64)
    for turn in range(2):
        run(core, request(f"r{turn}", range(2, 2 + 2 * BLOCK + 1)))
    stats = core.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (2 * (2 * BLOCK + 1), 2 * BLOCK)


def test_the_picture_cache_is_asked_once_for_each_picture_of_a_prompt() -> None:
    core = build_core(budget=64, caching=False)
    run(core, request("both", range(2, 22), [(0, A), (8, B)]))
    run(core, request("again", range(3, 23), [(0, A), (8, A)]))
    assert (core.stats().image_queries, core.stats().image_hits) == (4, 2)


def test_a_picture_in_a_cached_prefix_needs_no_embedding_and_asks_for_none() -> None:
    core = build_core(budget=64)
    prompt = request("r", range(2, 2 + 3 * BLOCK), [(0, A)])
    run(core, prompt)
    run(core, replace(prompt, request_id="again"))
    assert (core.stats().image_queries, core.stats().image_hits) == (1, 0)


def test_what_happened_when() -> None:
    before = time.monotonic()
    core = build_core(seqs=1)
    deltas = run(core, *(request(i, range(2, 12), ignore_eos=True, max_new_tokens=3) for i in "ab"))
    after = time.monotonic()
    first, second = deltas["a"][-1].timing, deltas["b"][-1].timing
    for timing in (first, second):
        assert timing is not None
        assert timing.started and timing.first_token and timing.last_token
        assert before <= timing.arrived <= timing.queued <= timing.started
        assert timing.started < timing.first_token < timing.last_token <= after
    assert first and second and first.last_token and second.started
    assert second.started >= first.last_token  # it had to wait for the only place


def test_the_first_token_brings_its_timing_and_the_others_do_not() -> None:
    (first, *middle, last) = run(
        build_core(), request("r", range(2, 12), ignore_eos=True, max_new_tokens=5)
    )["r"]
    assert first.timing is not None and last.timing is not None
    assert first.timing.first_token == first.timing.last_token == last.timing.first_token
    assert [delta.timing for delta in middle] == [None] * 3


def test_what_never_ran_has_waited_only() -> None:
    core = build_core()
    core.add(replace(request("late", range(2, 12)), deadline=0.0))
    (delta,) = core.step()
    assert isinstance(delta.error, RequestTimeout)
    assert delta.timing is not None
    assert (delta.timing.started, delta.timing.first_token) == (None, None)
    core.add(request("aborted", range(2, 12)))
    (delta,) = core.abort("aborted")
    assert delta.timing is not None and delta.timing.started is None


def test_gaps_are_sorted_by_their_upper_bounds() -> None:
    gaps = TokenGaps()
    for seconds in (0.0, 0.001, 0.0011, 80.0, 81.0):
        gaps.add(seconds)
    counts = dict(zip((*BOUNDS_S, float("inf")), gaps.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {
        0.001: 2, 0.0025: 1, 80.0: 1, float("inf"): 1,
    }  # fmt: skip


def test_a_step_is_one_gap_however_many_go_on_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("models.engine.scheduler.time.monotonic", lambda: now)
    core = build_core(budget=64)
    for i in range(3):
        core.add(request(f"r{i}", range(2 + i, 12 + i), ignore_eos=True, max_new_tokens=3))
    for seconds in (5.0, 0.2, 0.2):  # the first is the prompts', and no gap
        now += seconds
        core.step()
    assert not core.has_work
    counts = core.stats().token_gaps
    assert counts[BOUNDS_S.index(0.2)] + counts[BOUNDS_S.index(0.3)] == sum(counts) == 2


# ---- through the engine, and through its process ------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=1, num_threads=1,
        own_process=request.param,
    ) as engine:  # fmt: skip
        yield engine


def take(engine: Engine, count: int) -> list[FinishedRequest]:
    taken: list[FinishedRequest] = []
    deadline = time.monotonic() + 20
    while len(taken) < count:
        assert time.monotonic() < deadline, taken
        taken += engine.take_finished()
        time.sleep(0.005)
    assert engine.take_finished() == []
    return taken


def durations(timing: Timing) -> list[float]:
    assert timing.started is not None
    assert timing.first_token is not None and timing.last_token is not None
    points = [timing.arrived, timing.queued, timing.started, timing.first_token, timing.last_token]
    return [b - a for a, b in pairwise(points)]


def test_every_ended_request_is_reported_once(engine: Engine) -> None:
    before = time.monotonic()
    params = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    *_, last = engine.generate(PROMPT, [PICTURE], params)
    (finished,) = take(engine, 1)
    assert (finished.reason, finished.usage) == ("length", last.usage)
    assert finished.usage.completion_tokens == 5
    assert finished.timing is not None and finished.timing == last.timing
    assert finished.timing.arrived >= before
    assert min(durations(finished.timing)) >= 0 < max(durations(finished.timing))
    assert sum(durations(finished.timing)) <= time.monotonic() - before


async def test_arrival_is_before_the_pictures_are_decoded(engine: Engine) -> None:
    def slowly() -> list[Image.Image]:
        time.sleep(0.1)
        return [PICTURE]

    async for _ in engine.stream(PROMPT, slowly, SamplingParams(max_new_tokens=1)):
        pass
    (finished,) = take(engine, 1)
    assert finished.timing is not None
    assert finished.timing.queued - finished.timing.arrived >= 0.1


async def test_whoever_leaves_is_reported_as_aborted(engine: Engine) -> None:
    long = SamplingParams(max_new_tokens=2000, ignore_eos=True)
    running = engine.stream("tell me", params=long)
    await anext(running)
    waiting = asyncio.ensure_future(anext(engine.stream("tell me too", params=long)))
    while engine.stats().num_waiting == 0:
        await asyncio.sleep(0.005)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    (finished,) = take(engine, 1)
    assert finished.reason == "abort"
    assert finished.timing is not None and finished.timing.started is None
    await running.aclose()
    (finished,) = take(engine, 1)
    assert finished.reason == "abort" and finished.usage.completion_tokens > 0
