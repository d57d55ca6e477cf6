"""One request's answer does not depend on who else is there; and everything comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.core import EngineCore
from models.engine.messages import GenerationRequest
from models.errors import EngineFault, RequestAborted, RequestTimeout
from tests.unit.engine.harness import (
    EOS,
    VOCAB,
    Picture,
    alone,
    answers,
    build_core,
    request,
    run_all,
)  # fmt: skip

PICTURES = [Picture(b"\x01", 6), Picture(b"\x02", 6), Picture(b"\x03", 9)]


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
    params: dict[str, object] = {"max_new_tokens": draw(st.integers(1, 20))}
    if draw(st.booleans()):
        params |= {"temperature": 1.0, "seed": draw(st.integers(0, 99))}
        params |= draw(st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]))
    if draw(st.booleans()):
        params["repetition_penalty"] = 1.2
    return request(name, tokens, pictures, **params)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_answer_is_the_same_alone_and_in_any_company(data: st.DataObject) -> None:
    """Random arrivals, lengths, chunks, preemptions and aborts, in a pool that is too small."""
    core = build_core(
        blocks=data.draw(st.integers(15, 30), "blocks"),
        seqs=data.draw(st.integers(1, 5), "seqs"),
        budget=data.draw(st.integers(1, 32), "budget"),
        caching=data.draw(st.booleans(), "caching"),
    )
    coming = [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(1, 7)))]
    aborted: set[str] = set()
    deltas = []
    arrived: list[GenerationRequest] = []
    while coming or core.has_work:
        if coming and (not core.has_work or data.draw(st.booleans(), "arrival")):
            arrived.append(coming.pop(0))
            core.add(arrived[-1])
        if arrived and data.draw(st.integers(0, 15), "abort") == 0:
            victim = data.draw(st.sampled_from(arrived)).request_id
            aborted |= {delta.request_id for delta in core.abort(victim)}
        deltas += core.step()
        core.check_integrity()
    core.check_idle()
    got = answers(deltas)
    for req in arrived:
        expected = alone(req)
        if req.request_id in aborted:
            assert got.get(req.request_id, []) == expected[: len(got.get(req.request_id, []))]
        else:
            assert got[req.request_id] == expected


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
    late = request("late", [4, 5])
    core.add(type(late)(late.request_id, late.token_ids, (), late.params, deadline=0.0))
    (delta,) = [d for d in core.step() if d.request_id == "late"]
    assert delta.finish_reason == "error" and isinstance(delta.error, RequestTimeout)
    assert not delta.token_ids
    run_all(core)


def test_finish_reasons() -> None:
    def finish(**params: object) -> tuple[str | None, list[int], str]:
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


def test_end_of_sequence_is_counted_but_not_shown() -> None:
    for start in range(2, VOCAB):
        core = build_core()
        core.add(request("r", [start, 3], max_new_tokens=100))
        deltas = run_all(core)
        if deltas[-1].finish_reason == "stop":
            tokens = answers(deltas)["r"]
            assert tokens[-1] == EOS and deltas[-1].usage.completion_tokens == len(tokens)
            assert len("".join(d.text for d in deltas)) == len(tokens) - 1
            return
    pytest.fail("no prompt made the random model say EOS")


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


def test_a_step_that_raises_frees_what_it_ran() -> None:
    core: EngineCore = build_core()

    def explode(batch: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("pretended")

    run = core.runner.run
    core.add(request("r", [4, 5, 6]))
    core.runner.run = explode  # type: ignore[method-assign,assignment]
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        core.step()
    (delta,) = core.fail_running(caught.value)
    assert isinstance(delta.error, EngineFault)
    core.check_idle()
    core.runner.run = run  # type: ignore[method-assign]
    core.add(request("again", [4, 5, 6]))
    assert answers(run_all(core))["again"] == alone(request("again", [4, 5, 6]))
