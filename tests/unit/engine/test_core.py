"""One request's answer does not depend on who else is there; and everything comes back."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.core import EngineCore
from models.engine.guide import Guide
from models.engine.messages import GenerationDelta, GenerationRequest, TokenLogprobs
from models.errors import EngineFault, RequestAborted, RequestTimeout
from tests.unit.engine.harness import (
    VOCAB,
    Picture,
    alone,
    alone_deltas,
    answers,
    build_core,
    request,
    run_all,
    wait_for_guides,
)  # fmt: skip

PICTURES = [Picture(b"\x01", 6), Picture(b"\x02", 6), Picture(b"\x03", 9)]


GUIDES = [Guide("regex", "[A-Z]{2,30}"), Guide("choice", '["YES", "NO", "NONE"]')]


@st.composite
def requests(draw: st.DrawFn, name: str) -> GenerationRequest:
    """Short and long prompts, some with a common beginning, some with pictures."""
    length = draw(st.integers(1, 40))
    family = draw(st.integers(0, 2))
    tokens = [2 + (family * 7 + i * (family + 3)) % (VOCAB - 2) for i in range(length)]
    tokens[-1] = draw(st.integers(2, VOCAB - 1))
    pictures = []
    if length > 12 and draw(st.booleans()):
        pictures.append((draw(st.sampled_from([0, 2])), draw(st.sampled_from(PICTURES))))
    params: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 20))}
    if draw(st.booleans()):
        params |= {"temperature": 1.0, "seed": draw(st.integers(0, 99))}
        params |= draw(st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]))
    if draw(st.booleans()):
        params["repetition_penalty"] = 1.2
    if draw(st.booleans()):
        params |= {"presence_penalty": 0.5, "frequency_penalty": draw(st.sampled_from([-0.5, 0.5]))}
    if draw(st.booleans()):
        params |= {"logit_bias": {draw(st.integers(2, VOCAB - 1)): 2.5}, "min_tokens": 1}
    params["logprobs"] = draw(st.sampled_from([None, 0, 3]))
    params["guide"] = draw(st.sampled_from([None, None, *GUIDES]))
    return request(name, tokens, pictures, **params)


def logprobs_of(deltas: list[GenerationDelta], request_id: str) -> list[TokenLogprobs]:
    return [lp for delta in deltas if delta.request_id == request_id for lp in delta.logprobs]


def near(got: list[TokenLogprobs], alone: list[GenerationDelta], tokens: list[int]) -> None:
    """The same log-probabilities, one for each token, up to rounding."""
    expected = [lp for delta in alone for lp in delta.logprobs][: len(got)]
    assert [lp.token_id for lp in got] == tokens
    for a, b in zip(got, expected, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-3)


@settings(max_examples=50)
@given(st.data())
def test_an_answer_is_the_same_alone_and_in_any_company(data: st.DataObject) -> None:
    """Random arrivals, lengths, chunks, preemptions and aborts, in a pool that is too small."""
    core = build_core(
        blocks=data.draw(st.integers(15, 30), "blocks"),
        seqs=data.draw(st.integers(1, 5), "seqs"),
        budget=data.draw(st.integers(1, 32), "budget"),
        caching=data.draw(st.booleans(), "caching"),
        async_scheduling=data.draw(st.booleans(), "async"),
    )
    coming = [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(1, 7)))]
    aborted: set[str] = set()
    deltas = []
    arrived: list[GenerationRequest] = []
    while coming or core.has_work:
        if coming and (not core.has_work or data.draw(st.booleans(), "arrival")):
            arrived.append(coming.pop(0))
            core.add(arrived[-1])
            wait_for_guides(core)
        if arrived and data.draw(st.integers(0, 15), "abort") == 0:
            victim = data.draw(st.sampled_from(arrived)).request_id
            aborted |= {delta.request_id for delta in core.abort(victim)}
        deltas += core.step()
        core.check_integrity()
    core.check_idle()
    assert len([d for d in deltas if d.finish_reason]) == len(arrived) - len(aborted)
    got = answers(deltas)
    for req in arrived:
        expected = alone(req)
        if req.params.logprobs is not None:
            near(
                logprobs_of(deltas, req.request_id), alone_deltas(req), got.get(req.request_id, [])
            )
        if req.request_id in aborted:
            assert got.get(req.request_id, []) == expected[: len(got.get(req.request_id, []))]
        else:
            assert got[req.request_id] == expected


@settings(max_examples=15)
@given(st.data())
def test_an_answer_is_the_same_from_a_warm_cache(data: st.DataObject) -> None:
    """Prefix hits by earlier requests, pictures included, and by each other while running."""
    coming = [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(1, 4)))]
    core = build_core(
        blocks=data.draw(st.integers(40, 60), "blocks"),
        seqs=3,
        async_scheduling=data.draw(st.booleans(), "async"),
    )
    for turn in range(2):
        for req in coming:
            core.add(replace(req, request_id=f"{req.request_id} {turn}"))
        got = answers(run_all(core))
        for req in coming:
            assert got[f"{req.request_id} {turn}"] == alone(req)
        assert core.stats().image_cache_bytes <= 1 << 20
    if all(len(req.token_ids) > 8 for req in coming):
        assert core.stats().prefix_hit_tokens > 0


def test_preemption_happens_and_changes_nothing() -> None:
    reqs = [
        request(f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, ignore_eos=True) for i in range(4)
    ]
    core = build_core(blocks=20, seqs=4, budget=16, caching=False)
    for req in reqs:
        core.add(req)
    got = answers(run_all(core))
    assert core.stats().num_preemptions > 0
    assert got == {req.request_id: alone(req) for req in reqs}


def test_preemption_keeps_penalties_logprobs_and_guides() -> None:
    reqs = [
        request(
            f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, temperature=1.0, seed=i, logprobs=2,
            frequency_penalty=0.3, presence_penalty=0.2, guide=Guide("regex", "[A-Z]{40}"),
        )
        for i in range(4)
    ]  # fmt: skip
    core = build_core(blocks=20, seqs=4, budget=16, caching=False)
    for req in reqs:
        core.add(req)
    deltas = run_all(core)
    assert core.stats().num_preemptions > 0
    got = answers(deltas)
    for req in reqs:
        assert got[req.request_id] == alone(req)
        near(logprobs_of(deltas, req.request_id), alone_deltas(req), got[req.request_id])
        text = "".join(d.text for d in deltas if d.request_id == req.request_id)
        assert len(text) == 25 and text.isalpha() and text.isupper()


def test_requests_are_admitted_in_their_order() -> None:
    core = build_core(seqs=2)
    for i in range(5):
        core.add(request(f"r{i}", [5, 6, 7], max_new_tokens=4, ignore_eos=True))
    ended = [d.request_id for d in run_all(core) if d.finish_reason]
    assert ended == [f"r{i}" for i in range(5)]


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    core = build_core(blocks=64, seqs=2, budget=8, caching=False)
    core.add(request("stream", [5, 6], max_new_tokens=30, ignore_eos=True))
    core.step()
    core.add(request("long", [3 + i % 50 for i in range(100)], max_new_tokens=2))
    steps = 0
    while (ids := [d.request_id for d in core.step()]) == ["stream"]:
        steps += 1  # one token of the stream in every step of the other's prefill
    assert ids == ["stream", "long"] and steps >= 100 // 8
    run_all(core)


def test_the_next_turn_computes_only_what_is_new() -> None:
    core = build_core()
    turn = [7 + i % 40 for i in range(30)]
    core.add(request("one", turn, [(4, PICTURES[0])], max_new_tokens=9, ignore_eos=True))
    answer = answers(run_all(core))["one"]
    before = core.runner.images.num_encoded
    two = request("two", turn + answer + [11, 12, 13], [(4, PICTURES[0])], max_new_tokens=3)
    core.add(two)
    deltas = run_all(core)
    known = len(turn) + len(answer)
    assert deltas[-1].usage.cached_tokens >= known - 4
    assert core.runner.images.num_encoded == before, "the picture was not encoded again"
    assert answers(deltas)["two"] == alone(two)


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_an_abort_gives_everything_back_in_every_phase(phase: str) -> None:
    core = build_core(seqs=1, budget=4, caching=False)
    if phase == "waiting":
        core.add(request("other", [4, 5, 6]))
        core.step()
    core.add(request("gone", list(range(2, 40)), [(2, PICTURES[2])], max_new_tokens=50))
    for _ in range({"waiting": 1, "prefill": 3, "decode": 14}[phase]):
        core.step()
    (delta,) = core.abort("gone")
    assert delta.finish_reason == "abort" and isinstance(delta.error, RequestAborted)
    core.check_integrity()
    run_all(core)
    assert core.stats().blocks_used == 0 and core.stats().blocks_free == core.stats().blocks_total
    assert core.abort("gone") == []


def test_a_request_that_waited_too_long_ends_with_an_error_and_never_runs() -> None:
    core = build_core(seqs=1)
    core.add(request("first", [4, 5], max_new_tokens=10, ignore_eos=True))
    core.step()
    core.add(replace(request("late", [4, 5]), deadline=0.0))
    (delta,) = [d for d in core.step() if d.request_id == "late"]
    assert delta.finish_reason == "error" and isinstance(delta.error, RequestTimeout)
    assert not delta.token_ids
    run_all(core)


def test_the_line_is_kept_even_where_a_later_request_would_fit() -> None:
    """A large request at its head is not overtaken until it starves."""
    core = build_core(blocks=20, seqs=4, caching=False)
    core.add(request("running", [5] * 30, max_new_tokens=20, ignore_eos=True))
    core.step()
    core.add(request("large", [6] * 60, max_new_tokens=2, ignore_eos=True))
    core.add(request("small", [7], max_new_tokens=1, ignore_eos=True))
    waiting = []
    while core.scheduler.waiting:
        waiting.append([seq.request_id for seq in core.scheduler.waiting])
        core.step()
    assert len(waiting) > 10 and all(line in (["large", "small"], ["small"]) for line in waiting)
    run_all(core)


def test_a_preempted_request_goes_on_before_those_that_never_ran() -> None:
    core = build_core(blocks=20, seqs=4, budget=16, caching=False)
    for i in range(8):
        core.add(request(f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, ignore_eos=True))
    first_turns: list[str] = []
    while core.has_work:
        before = core.stats().num_preemptions
        core.step()
        if core.stats().num_preemptions > before:
            line = [seq.num_output_tokens > 0 for seq in core.scheduler.waiting]
            assert line == sorted(line, reverse=True), "those with an answer begun stand in front"
        for seq in core.scheduler.running:
            if seq.request_id not in first_turns:
                first_turns.append(seq.request_id)
    assert core.stats().num_preemptions > 0
    assert first_turns == [f"r{i}" for i in range(8)]


def test_a_deadline_counts_only_until_the_first_turn() -> None:
    """Neither running past it nor being preempted behind it is a reason to be dropped."""
    core = build_core(blocks=20, seqs=4, budget=16, caching=False)
    for i in range(4):
        req = request(f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, ignore_eos=True)
        core.add(replace(req, deadline=time.monotonic() + 3600))
    while core.stats().num_preemptions == 0:
        core.step()
    preempted = [seq for seq in core.scheduler.waiting if seq.num_output_tokens]
    assert preempted and all(seq.deadline is None for seq in preempted)
    for seq in core.scheduler.running:
        seq.deadline = 0.0  # long past
    deltas = run_all(core)
    assert [d for d in deltas if d.error is not None] == []
    assert {seq.num_output_tokens for seq in preempted} == {25}


def test_deadlines_are_kept_while_nothing_can_be_admitted() -> None:
    core = build_core(seqs=1)
    core.add(request("running", [4, 5], max_new_tokens=40, ignore_eos=True))
    core.step()
    soon = replace(request("soon", [4, 5]), deadline=0.0)
    later = replace(request("later", [4, 5]), deadline=time.monotonic() + 3600)
    core.add(later)
    core.add(soon)
    ended = [d.request_id for d in core.step() if d.finish_reason]
    assert ended == ["soon"], "whoever's time is up, wherever in the line"
    assert answers(run_all(core))["later"] == alone(later)


EDGES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 1e-5, 1e-4, 1.0, 100.0, 1e30, 1e308]),
        "top_p": st.sampled_from([0.0, 1e-9, 1e-7, 0.5, 1 - 1e-9, 1.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, VOCAB, VOCAB + 1, 2**31, 2**63, 10**30]),
        "min_p": st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1e-3, 0.5, 1.0, 2.0, 1e3]),
        "seed": st.sampled_from([0, -1, 2**63, -(2**70), 10**30]),
        "max_new_tokens": st.sampled_from([1, 2, 10**30]),
        "stop": st.sampled_from(["", "a", "zz"]),
        "stop_token_ids": st.sampled_from([(), (0,), (VOCAB - 1, VOCAB, 10**30)]),
        "ignore_eos": st.booleans(),
        "presence_penalty": st.sampled_from([-2.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 2.0]),
        "logit_bias": st.sampled_from([{0: -100.0}, {VOCAB - 1: 100}, {VOCAB + 5: 1.0}]),
        "min_tokens": st.sampled_from([0, 1]),
        "logprobs": st.sampled_from([0, 20]),
        "guide": st.sampled_from(GUIDES),
    },
)


@settings(max_examples=40)
@given(st.lists(EDGES, min_size=1, max_size=4))
def test_no_value_at_its_edge_stops_the_engine_or_a_neighbour(
    edges: list[dict[str, Any]],
) -> None:
    core = build_core(max_len=24)
    plain = request("plain", [9, 8, 7])
    core.add(plain)
    for i, params in enumerate(edges):
        core.add(request(f"r{i}", [3 + i, 4, 5], **{"temperature": 1.0, **params}))
    deltas = run_all(core)
    assert answers(deltas)["plain"] == alone(plain)
    ended = [d for d in deltas if d.finish_reason]
    assert len(ended) == len(edges) + 1 and {d.finish_reason for d in ended} <= {"stop", "length"}
    assert all(0 <= t < VOCAB for tokens in answers(deltas).values() for t in tokens)


def test_an_unseeded_answer_differs_from_time_to_time_and_a_seeded_one_never() -> None:
    def draw(**params: Any) -> tuple[int, ...]:
        core = build_core()
        core.add(request("r", [9, 8], temperature=3.0, ignore_eos=True, **params))
        return tuple(answers(run_all(core))["r"])

    assert len({draw() for _ in range(6)}) > 1
    assert len({draw(seed=5) for _ in range(3)}) == 1
    assert len({draw(seed=seed) for seed in range(6)}) > 1


def test_in_float32_a_seeded_answer_is_the_same_from_a_cached_prompt() -> None:
    """In 16 bits another number of computed tokens may round otherwise; see SamplingParams.seed."""
    core, drawn = build_core(), []
    for turn in range(3):
        core.add(request(f"r{turn}", range(3, 23), temperature=3.0, seed=5, ignore_eos=True))
        drawn.append(answers(run_all(core))[f"r{turn}"])
    assert core.stats().prefix_hit_tokens > 0
    assert drawn[0] == drawn[1] == drawn[2]


def test_finish_reasons() -> None:
    def finish(**params: Any) -> tuple[str | None, list[int], str]:
        core = build_core()
        core.add(request("r", [9, 8, 7], **params))
        deltas = run_all(core)
        text = "".join(d.text for d in deltas)
        return deltas[-1].finish_reason, answers(deltas)["r"], text

    reason, tokens, text = finish(max_new_tokens=6, ignore_eos=True)
    assert (reason, len(tokens), len(text)) == ("length", 6, 6)
    assert finish(stop_token_ids=(tokens[2],), ignore_eos=True)[0] == "stop"
    reason, some, cut = finish(max_new_tokens=6, ignore_eos=True, stop=(text[3:5],))
    assert reason == "stop" and cut == text[: text.index(text[3:5])] and len(some) == 5
    core = build_core(blocks=4)
    core.add(request("r", [9] * 10, max_new_tokens=1000, ignore_eos=True))
    deltas = run_all(core)
    assert deltas[-1].finish_reason == "length", "the context is the limit"
    assert deltas[-1].usage.total_tokens == 16


def test_min_tokens_and_stop_reasons() -> None:
    def finish(**params: Any) -> tuple[GenerationDelta, list[int], str]:
        core = build_core()
        core.add(request("r", [9, 8, 7], ignore_eos=True, **params))
        deltas = run_all(core)
        return deltas[-1], answers(deltas)["r"], "".join(d.text for d in deltas)

    last, tokens, text = finish(max_new_tokens=8)
    assert last.stop_reason is None
    first = tokens.index(tokens[3])
    last, _, _ = finish(max_new_tokens=8, stop_token_ids=(tokens[3],))
    assert (last.finish_reason, last.stop_reason) == ("stop", tokens[3])
    last, some, cut = finish(max_new_tokens=8, stop=("nothing", text[1:3]))
    assert (last.finish_reason, last.stop_reason, cut) == ("stop", text[1:3], text[:1])
    assert len(some) == 3
    last, later, _ = finish(max_new_tokens=8, stop_token_ids=(tokens[3],), min_tokens=7)
    assert tokens[3] not in later[:7] and later[:first] == tokens[:first] and len(later) >= 7
    last, _, kept = finish(max_new_tokens=8, stop=(text[1:3],), min_tokens=3)
    assert kept.startswith(text[:3]), "a stop string that came too early is a part of the text"


def test_end_of_sequence_is_counted_but_not_shown() -> None:
    core = build_core()
    core.add(request("r", [9, 8, 7], max_new_tokens=12, ignore_eos=True))
    whole = run_all(core)
    tokens, text = answers(whole)["r"], "".join(d.text for d in whole)
    end = tokens.index(tokens[6])
    core = build_core()
    core.scheduler.eos_token_ids = frozenset({tokens[6]})
    core.add(request("r", [9, 8, 7], max_new_tokens=12))
    deltas = run_all(core)
    assert deltas[-1].finish_reason == "stop"
    assert answers(deltas)["r"] == tokens[: end + 1]
    assert deltas[-1].usage.completion_tokens == end + 1
    assert "".join(d.text for d in deltas) == text[:end]


def test_not_a_number_ends_one_request_and_spares_the_others() -> None:
    core = build_core(caching=False)

    def broken(pictures: list[Picture]) -> list[torch.Tensor]:
        return [torch.full((p.num_tokens, 32), float("nan")) for p in pictures]

    core.runner.images._encode = broken  # type: ignore[assignment]
    good = request("good", [4, 5, 6])
    core.add(good)
    core.add(request("bad", list(range(2, 20)), [(1, PICTURES[0])]))
    deltas = run_all(core)
    (bad,) = [d for d in deltas if d.request_id == "bad"]
    assert isinstance(bad.error, EngineFault)
    assert answers(deltas)["good"] == alone(good)


def test_what_is_no_number_in_another_ones_blocks_reaches_nobody() -> None:
    """A request may leave such blocks behind, half of which the next one uses."""
    core = build_core(caching=False)
    for vectors in (*core.runner.cache.keys, *core.runner.cache.values):
        vectors.fill_(float("nan"))
    reqs = [request(f"r{i}", range(2, 4 + 5 * i), max_new_tokens=9) for i in range(4)]
    for req in reqs:
        core.add(req)
    assert answers(run_all(core)) == {req.request_id: alone(req) for req in reqs}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_step_that_raises_frees_what_it_ran(async_scheduling: bool) -> None:
    core: EngineCore = build_core(async_scheduling=async_scheduling)

    def explode(batch: object, in_flight: object) -> torch.Tensor:
        raise RuntimeError("pretended")

    run = core.runner.run
    core.add(request("r", [4, 5, 6], ignore_eos=True))
    core.step()
    core.runner.run = explode  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError) as caught:
        core.step()
    (delta,) = core.fail_running(caught.value)
    assert isinstance(delta.error, EngineFault)
    assert delta.usage is not None and delta.usage.completion_tokens == (not async_scheduling)
    assert not core.has_work
    core.check_idle()
    core.runner.run = run  # type: ignore[method-assign]
    core.add(request("again", [4, 5, 6]))
    assert answers(run_all(core))["again"] == alone(request("again", [4, 5, 6]))
