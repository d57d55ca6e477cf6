"""A step in flight while the next one is scheduled, and what may happen meanwhile.

That answers are the same is in `test_core.py`, whose random runs schedule either way.
"""

from __future__ import annotations

import time

import pytest

from tests.unit.engine.harness import (
    Picture,
    alone,
    answers,
    build_core,
    request,
    run_all,
)  # fmt: skip

PICTURES = [Picture(b"\x01", 6), Picture(b"\x02", 6), Picture(b"\x03", 9)]


def test_an_async_step_is_in_flight_while_the_next_one_is_scheduled() -> None:
    core = build_core(async_scheduling=True)
    core.add(request("r", [4, 5, 6], max_new_tokens=3, ignore_eos=True))
    assert core.step() == [] and core.has_work, "the first token is on its way"
    lengths = []
    while core.has_work:
        (delta,) = core.step()
        lengths.append(len(delta.token_ids))
    assert lengths == [1, 1, 1] and core.num_steps == 3, "no step behind the last token"


def test_what_ends_while_a_step_is_in_flight_leaves_a_row_that_nobody_reads() -> None:
    core = build_core(async_scheduling=True, caching=False)
    kept, gone = request("kept", [4, 5, 6], max_new_tokens=9), request("gone", [7, 8])
    for req in (kept, gone):
        core.add(req)
    core.step()
    (delta,) = core.abort("gone")
    assert delta.usage is not None and delta.usage.completion_tokens == 0
    core.check_integrity()
    assert answers(run_all(core)) == {"kept": alone(kept)}
    core.add(gone)
    core.step()
    core.abort("gone")
    assert not core.has_work, "nobody waits for what is in flight"
    core.check_idle()


def test_idle_time_is_no_steps_time() -> None:
    """A step in flight whose requests have all ended is landed when the next one comes."""
    core = build_core(async_scheduling=True, slowdown=0.5)
    core.add(request("gone", [7, 8], max_new_tokens=9, ignore_eos=True))
    for _ in range(4):
        core.step()
    budget = core.scheduler.prefill_budget
    before = budget._decode_s
    assert before is not None
    core.abort("gone")
    time.sleep(100 * before)
    core.add(request("next", [4, 5, 6]))
    core.step()
    assert budget._decode_s == before


def test_what_has_ended_is_told_even_if_the_step_fails_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = build_core(async_scheduling=True)
    core.add(request("ends", [4, 5, 6], max_new_tokens=1, ignore_eos=True))
    core.add(request("goes on", [7, 8], max_new_tokens=9, ignore_eos=True))
    core.step()

    def fail(*_: object) -> None:
        raise RuntimeError("pretended")

    monkeypatch.setattr(core.sampler, "sample", fail)
    with pytest.raises(RuntimeError) as caught:
        core.step()
    ended = {delta.request_id: delta.finish_reason for delta in core.fail_running(caught.value)}
    assert ended["ends"] == "length" and ended["goes on"] == "error"
    core.check_idle()


def test_followers_wait_for_blocks_that_are_in_flight() -> None:
    core = build_core(budget=64, async_scheduling=True)
    shared = [3 + i % 50 for i in range(40)]
    core.add(request("leader", [*shared, 2]))
    core.step()
    core.add(request("follower", [*shared, 9]))
    deltas = run_all(core)
    cached = {d.request_id: d.usage.cached_tokens for d in deltas if d.usage is not None}
    assert cached == {"leader": 0, "follower": 40}
