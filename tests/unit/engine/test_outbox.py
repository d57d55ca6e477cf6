"""What goes out when: first and last deltas at once, the others at the ticks of one clock."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from models.engine.messages import FinishReason, GenerationDelta, Timing, TokenLogprobs, Usage
from models.engine.outbox import Outbox, merged
from models.errors import EngineFault

INTERVAL_S = 0.1


def delta(
    request_id: str, token: int, finish_reason: FinishReason | None = None
) -> GenerationDelta:
    return GenerationDelta(
        request_id, f"{token} ", (token,), finish_reason, Usage(3, token + 1),
        logprobs=(TokenLogprobs(token, -1.0),),
    )  # fmt: skip


def outbox_of(*request_ids: str, interval_s: float = INTERVAL_S) -> Outbox:
    outbox = Outbox()
    for request_id in request_ids:
        outbox.open(request_id, interval_s)
    return outbox


def test_merging_joins_what_is_new_and_keeps_the_last_state() -> None:
    timing = Timing(1.0, 2.0)
    first = GenerationDelta("r", "a", (1,), timing=timing, logprobs=(TokenLogprobs(1, -1.0),))
    last = GenerationDelta(
        "r", "b", (2,), "stop", Usage(3, 2), logprobs=(TokenLogprobs(2, -2.0),), stop_reason="."
    )
    assert merged([first, last]) == GenerationDelta(
        "r", "ab", (1, 2), "stop", Usage(3, 2), None,
        (TokenLogprobs(1, -1.0), TokenLogprobs(2, -2.0)), ".", timing,
    )  # fmt: skip


def test_the_first_and_the_last_go_at_once_and_the_others_with_the_next_tick() -> None:
    outbox = outbox_of("r")
    steps = [(0.05, 0), (0.06, 1), (0.09, 2), (0.12, 3), (0.13, 4), (0.14, 5)]
    sent = {
        now: [d.token_ids for d in outbox.post([delta("r", token)], now)] for now, token in steps
    }
    assert sent == {0.05: [(0,)], 0.06: [], 0.09: [], 0.12: [(1, 2, 3)], 0.13: [], 0.14: []}
    (last,) = outbox.post([delta("r", 6, "length")], 0.15)
    assert (last.text, last.token_ids, last.finish_reason) == ("4 5 6 ", (4, 5, 6), "length")
    assert last.usage == Usage(3, 7)
    assert outbox.post([], 10.0) == outbox.flush() == []


def test_all_with_one_interval_go_together_whenever_they_have_begun() -> None:
    outbox = outbox_of("a", "b")
    assert outbox.post([delta("a", 0)], 0.01)
    assert outbox.post([delta("a", 1), delta("b", 0)], 0.08) == [delta("b", 0)]
    assert outbox.post([delta("a", 2), delta("b", 1)], 0.09) == []
    sent = outbox.post([delta("a", 3), delta("b", 2)], 0.11)
    assert {d.request_id: d.token_ids for d in sent} == {"a": (1, 2, 3), "b": (1, 2)}


def test_a_tick_takes_along_who_gained_nothing_in_this_step() -> None:
    """A request that has been preempted, say; it may be long until it gains again."""
    outbox = outbox_of("a")
    outbox.post([delta("a", 0)], 0.01)
    outbox.post([delta("a", 1)], 0.02)
    assert [d.token_ids for d in outbox.post([delta("b", 0)], 0.11)] == [(0,), (1,)]


def test_an_interval_of_nought_is_each_step() -> None:
    outbox = outbox_of("fast", interval_s=0)
    for step in range(5):
        posted = [delta("fast", step), delta("unknown", step)]
        assert outbox.post(posted, 0.0) == posted


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_error_comes_by_itself_after_what_was_before_it(reason: FinishReason) -> None:
    outbox = outbox_of("r")
    outbox.post([delta("r", 0)], 0.01)
    outbox.post([delta("r", 1)], 0.02)
    outbox.post([delta("r", 2)], 0.03)
    end = GenerationDelta("r", finish_reason=reason, error=EngineFault("x"))
    before, last = outbox.post([end], 0.04)
    assert (before.token_ids, before.finish_reason, last) == ((1, 2), None, end)


def test_an_id_may_be_used_again() -> None:
    outbox = outbox_of("r")
    outbox.post([delta("r", 0, "stop")], 0.01)
    outbox.open("r", INTERVAL_S)
    assert outbox.post([delta("r", 7)], 0.02) == [delta("r", 7)]


def test_what_is_left_when_the_steps_end_is_not_lost() -> None:
    outbox = outbox_of("a", "b")
    outbox.post([delta("a", 0), delta("b", 0)], 0.01)
    outbox.post([delta("a", 1)], 0.02)
    outbox.post([delta("a", 2)], 0.03)
    assert [d.token_ids for d in outbox.flush()] == [(1, 2)]
    assert outbox.flush() == []


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_out_of_order_and_no_more_is_sent_than_wanted(seed: int) -> None:
    rng = random.Random(seed)
    intervals = {"a": 0.1, "b": 0.1, "c": 0.25, "d": 0.0}
    outbox = Outbox()
    for request_id, interval_s in intervals.items():
        outbox.open(request_id, interval_s)
    now, sent = rng.random(), []
    start, longest = now, 0.0
    for token in range(400):
        step = rng.choice([0.003, 0.01, 0.02])
        longest = max(longest, step)
        now += step
        reason: FinishReason | None = "length" if token == 399 else None
        posted = [delta(r, token, reason) for r in intervals]
        sent += [(now, d) for d in outbox.post(posted, now)]
    for request_id, interval_s in intervals.items():
        moments = [at for at, d in sent if d.request_id == request_id]
        deltas = [d for _, d in sent if d.request_id == request_id]
        assert [t for d in deltas for t in d.token_ids] == list(range(400))
        assert [lp.token_id for d in deltas for lp in d.logprobs] == list(range(400))
        if interval_s:
            assert len(moments) <= (now - start) / interval_s + 3
            gaps = [b - a for a, b in pairwise(moments)]
            assert max(gaps) < interval_s + longest + 1e-9
