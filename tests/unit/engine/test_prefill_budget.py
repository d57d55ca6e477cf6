"""Arriving prompts delay running streams by no more than the share that is allowed, and go on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.engine.prefill_budget import FREE_S, MIN_CHUNK, PrefillBudget
from tests.unit.engine.harness import alone, answers, build_core, request, run_all


class Machine:
    """Steps whose costs are known: `decode_s` for the streams, `token_s` for a prompt's token and
    `weights_s` for reading the weights of many rows."""

    def __init__(self, slowdown: float | None, decode_s: float, token_s: float, weights_s: float):
        self.budget = PrefillBudget(slowdown)
        self.decode_s, self.token_s, self.weights_s = decode_s, token_s, weights_s

    def step(self, decodes: int, wanted: int, most: int = 512) -> tuple[int, float]:
        """(prompt tokens computed, seconds)"""
        allowed = self.budget.tokens() if decodes else None
        tokens = min(wanted, most if allowed is None else min(most, allowed))
        seconds = (self.decode_s if decodes else 0) + tokens * self.token_s
        seconds += self.weights_s if tokens else 0
        self.budget.observe(decodes, tokens, seconds)
        return tokens, seconds


def warmed(slowdown: float | None, decode_s: float, token_s: float, weights_s: float) -> Machine:
    machine = Machine(slowdown, decode_s, token_s, weights_s)
    machine.step(0, 16)
    for _ in range(20):
        machine.step(4, 0)
    return machine


@given(
    st.floats(0.1, 1.0), st.floats(1e-3, 0.2), st.floats(1e-5, 1e-2), st.floats(0, 0.1),
    st.integers(1, 8),
)  # fmt: skip
def test_streams_are_delayed_by_the_share_on_average(
    slowdown: float, decode_s: float, token_s: float, weights_s: float, prompts: int
) -> None:
    machine = warmed(slowdown, decode_s, token_s, weights_s)
    for _ in range(prompts):
        machine.budget.arrive()
    left, steps, delay = 2000 * prompts, 0, 0.0
    # Each step pays a share in; together they must pay for all tokens, and for the weights of each
    # piece. A step may also end a piece's debt, or go beyond it, by less than its own share.
    pieces = -(-left // MIN_CHUNK)
    most_steps = (left * token_s + pieces * weights_s) / (slowdown * decode_s) + 2 * pieces
    while left:
        tokens, seconds = machine.step(4, left)
        left, steps, delay = left - tokens, steps + 1, delay + seconds - decode_s
        assert steps <= most_steps, "prompts go on"
    least = MIN_CHUNK * token_s + weights_s
    # What the requests may take at once, and the pieces that were under way.
    free = (prompts + 1) * FREE_S + max(least, weights_s + 2 * (prompts + 1) * FREE_S)
    assert delay <= slowdown * decode_s * steps + free


def test_short_prompts_that_come_together_do_not_wait_for_one_another() -> None:
    machine = warmed(0.45, 0.003, 0.0001, 0.0)
    for _ in range(8):
        machine.budget.arrive()
    left, steps = 8 * 170, 0
    while left:
        left -= machine.step(1, left)[0]
        steps += 1
    assert steps == 3, "as many as 512 tokens in a step take"


def test_a_quiet_time_is_not_saved_up() -> None:
    machine = warmed(0.45, 0.05, 0.004, 0.0)
    for _ in range(1000):
        machine.step(4, 0)
    assert machine.step(4, 2000)[0] == MIN_CHUNK


def test_without_streams_or_without_a_limit_prompts_are_not_held_back() -> None:
    assert warmed(0.45, 0.05, 0.004, 0.1).step(0, 2000)[0] == 512
    machine = warmed(None, 0.05, 0.004, 0.1)
    assert [machine.step(4, 2000)[0] for _ in range(4)] == [512] * 4


def test_before_anything_was_measured_nothing_is_held_back() -> None:
    assert Machine(0.45, 0.05, 0.004, 0.1).step(4, 2000)[0] == 512


def test_the_engine_holds_a_prompt_back_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps cost a second for each token here: all prompts are far beyond what is free."""
    core = build_core(blocks=128, seqs=3, budget=256, max_len=256, slowdown=0.5)
    clock = 0.0
    run = core.runner.run

    def timed(batch, in_flight):  # type: ignore[no-untyped-def]
        nonlocal clock
        clock += sum(chunk.end - chunk.start for chunk in batch.chunks)
        return run(batch, in_flight)

    monkeypatch.setattr(core.runner, "run", timed)
    monkeypatch.setattr("models.engine.core.time.perf_counter", lambda: clock)
    streams = [request(f"s{i}", [5 + i, 6], max_new_tokens=200, ignore_eos=True) for i in range(2)]
    for stream in streams:
        core.add(stream)
    for _ in range(5):
        core.step()
    long = request("long", [3 + i % 50 for i in range(110)], max_new_tokens=2)
    core.add(long)
    started, steps = clock, 0
    deltas = []
    while not any(delta.request_id == "long" for delta in deltas):
        deltas += core.step()
        steps += 1
    # The first 64 tokens cost 64 s; the streams' steps take 2 s and allow 1 s each.
    assert steps > 60 and clock - started <= 1.5 * 2 * steps + MIN_CHUNK
    deltas += run_all(core)
    assert answers(deltas)["long"] == alone(long)
