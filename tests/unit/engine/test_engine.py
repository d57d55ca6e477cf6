"""The engine's thread and its faces: sync, async, batch; aborts, failures, closing."""

from __future__ import annotations

import asyncio
import pickle
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import Engine, SamplingParams, load_engine
from models.engine.messages import GenerationDelta
from models.errors import (
    EngineDead,
    EngineFault,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
    TinyChatError,
)  # fmt: skip
from tests.tiny import write_tiny_llava
from tests.unit.engine.harness import core_of

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_new_tokens=400, ignore_eos=True)
PICTURE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


@pytest.fixture(params=[False, True], ids=["in turn", "async"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=4, num_threads=1,
        async_scheduling=request.param,
    ) as engine:  # fmt: skip
        yield engine
        settle(engine)


def settle(engine: Engine) -> None:
    """Waits for the engine to be idle, then asserts that every block has come back."""
    deadline = time.monotonic() + 10
    while engine._subscribers or core_of(engine).has_work:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.005)
    stats = engine.stats()
    assert stats.blocks_used == 0
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    core_of(engine).check_integrity()


def join(deltas: list[GenerationDelta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_all_faces_give_the_same_answer(engine: Engine) -> None:
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    one = list(engine.generate(prompt, [PICTURE], GREEDY))
    two = [delta async for delta in engine.stream(prompt, [PICTURE], GREEDY)]
    three = engine.generate_batch([(prompt, [PICTURE])] * 5, GREEDY)
    assert {join(one), join(two), *three} == {join(one)}
    assert one[-1].finish_reason == two[-1].finish_reason == "length"
    assert one[-1].usage.completion_tokens == 12
    assert one[-1].usage.prompt_tokens == two[-1].usage.prompt_tokens > 16
    assert [d.finish_reason for d in two[:-1]] == [None] * (len(two) - 1)


def test_an_interval_merges_deltas_and_changes_nothing_else(engine: Engine) -> None:
    """As the host delivers them: a reader that is slow would merge more."""

    def delivered(interval_s: float) -> list[GenerationDelta]:
        deltas: queue.SimpleQueue[GenerationDelta] = queue.SimpleQueue()
        request = engine._preparer.prepare("tell me", (), GREEDY)
        engine._submit(replace(request, min_interval_s=interval_s), deltas)
        got = [deltas.get(timeout=10)]
        while got[-1].finish_reason is None:
            got.append(deltas.get(timeout=10))
        return got

    each, few = delivered(0.0), delivered(1e9)  # whose clock does not tick within a test
    assert len(few) == 2 < len(each) == 12
    assert join(few) == join(each)
    assert [t for d in few for t in d.token_ids] == [t for d in each for t in d.token_ids]
    assert (few[0].text, few[0].usage) == (each[0].text, each[0].usage)  # at once
    assert (few[-1].finish_reason, few[-1].usage) == (each[-1].finish_reason, each[-1].usage)


async def test_pictures_may_come_from_a_function_that_runs_off_the_event_loop(
    engine: Engine,
) -> None:
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    threads: list[str] = []

    def decode() -> list[Image.Image]:
        threads.append(threading.current_thread().name)
        return [PICTURE]

    def refuse() -> list[Image.Image]:
        raise InvalidRequest("images[0]", "is damaged")

    deltas = [delta async for delta in engine.stream(prompt, decode, GREEDY)]
    assert join(deltas) == join(list(engine.generate(prompt, [PICTURE], GREEDY)))
    assert [name.partition("_")[0] for name in threads] == ["prepare"]
    with pytest.raises(InvalidRequest, match="is damaged"):
        await anext(engine.stream(prompt, refuse, GREEDY))


def test_messages_can_be_pickled(engine: Engine) -> None:
    request = engine._preparer.prepare("a <image> b", [PICTURE], GREEDY)
    again = pickle.loads(pickle.dumps(request))
    assert again.token_ids == request.token_ids
    assert torch.equal(again.images[0].image.pixel_values, request.images[0].image.pixel_values)
    (delta, *_) = engine.generate("hello", params=GREEDY)
    assert pickle.loads(pickle.dumps(delta)) == delta
    error = pickle.loads(pickle.dumps(InvalidRequest("prompt", "is empty")))
    assert (error.field, str(error)) == ("prompt", "prompt: is empty")


def test_answers_end_where_they_are_told_to(engine: Engine) -> None:
    whole = join(list(engine.generate("tell me", params=GREEDY)))
    stop = whole[4:7]

    def ask(**params: Any) -> list[GenerationDelta]:
        wanted = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **params}
        return list(engine.generate("tell me", params=SamplingParams(**wanted)))

    deltas = ask(stop=(stop, "never said"))
    assert join(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    fourth = ask()[3].token_ids[0]
    deltas = ask(stop_token_ids=(fourth,))
    assert deltas[-1].token_ids == (fourth,) and deltas[-1].finish_reason == "stop"
    assert whole.startswith(join(deltas)) and len(deltas) <= 4
    deltas = ask(max_new_tokens=3)
    assert (len(deltas), deltas[-1].finish_reason) == (3, "length")
    assert deltas[-1].usage.completion_tokens == 3 and whole.startswith(join(deltas))


def test_what_callers_may_ask_about_the_model(engine: Engine) -> None:
    assert engine.stop_token_ids == {2}
    (delta, *_) = engine.generate("a <image>", [PICTURE], params=GREEDY)
    assert engine.count_tokens("a <image>") == delta.usage.prompt_tokens


def test_leaving_a_plain_iterator_frees_everything_too(engine: Engine) -> None:
    stream = engine.generate("tell me", params=LONG)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    settle(engine)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_leaving_the_iterator_frees_everything(engine: Engine, after: int) -> None:
    stream = engine.stream("tell me", params=LONG)
    for _ in range(after):
        await anext(stream)
    await stream.aclose()
    for _ in range(200):
        if engine.stats().num_running == 0:
            break
        await asyncio.sleep(0.005)
    assert engine.stats().num_running == engine.stats().blocks_used == 0


async def test_cancelling_the_task_aborts_running_and_waiting(engine: Engine) -> None:
    async def consume() -> None:
        async for _ in engine.stream("tell me", params=LONG):
            pass

    tasks = [asyncio.create_task(consume()) for _ in range(10)]
    while engine.stats().num_waiting < 3:
        await asyncio.sleep(0.005)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_abort_by_id_ends_the_stream_with_an_error(engine: Engine) -> None:
    stream = engine.stream("tell me", params=LONG, request_id="mine")
    await anext(stream)
    engine.abort("mine")
    engine.abort("nobody's")
    with pytest.raises(RequestAborted):
        async for _ in stream:
            pass


async def test_a_request_that_waits_too_long_is_told_so(engine: Engine) -> None:
    async def consume() -> None:
        async for _ in engine.stream("tell me", params=LONG):
            pass

    tasks = [asyncio.create_task(consume()) for _ in range(4)]
    while engine.stats().num_running < 4:
        await asyncio.sleep(0.005)
    with pytest.raises(RequestTimeout):
        await anext(engine.stream("me too", params=GREEDY, queue_timeout_s=0.05))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_no_token_at_all_is_an_answer_too(engine: Engine) -> None:
    nothing = SamplingParams(max_new_tokens=0)
    (delta,) = [d async for d in engine.stream("hello", params=nothing)]
    assert (delta.text, delta.finish_reason) == ("", "length")
    assert delta.usage.prompt_tokens > 0 and delta.usage.completion_tokens == 0
    assert engine.generate_batch([("hello", [])], nothing) == [""]


@pytest.mark.parametrize(
    ("prompt", "images", "field"),
    [
        ("no placeholder", 1, "images"),
        ("<image> and <image>", 1, "images"),
        ("<image>", 0, "images"),
        ("x " * 5000, 0, "prompt"),
        ("<image>" * 200, 200, "prompt"),
        (None, 0, "prompt"),
    ],
)
async def test_wrong_requests_are_refused_before_they_are_queued(
    engine: Engine, prompt: str, images: int, field: str
) -> None:
    before = engine.stats().num_steps
    with pytest.raises(InvalidRequest) as caught:
        await anext(engine.stream(prompt, [PICTURE] * images, GREEDY))
    assert caught.value.field == field
    with pytest.raises(InvalidRequest):
        next(engine.generate("x", params=SamplingParams(stop_token_ids=(10**6,))))
    assert engine.stats().num_steps == before


async def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = core_of(engine).runner.run
    calls = 0

    def fail_once(batch: object, in_flight: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("pretended")
        return run(batch, in_flight)  # type: ignore[arg-type]

    monkeypatch.setattr(core_of(engine).runner, "run", fail_once)
    with pytest.raises(EngineFault):
        [delta async for delta in engine.stream("hello", params=GREEDY)]
    assert join([d async for d in engine.stream("hello", params=GREEDY)])
    engine.check_health()


def test_an_engine_that_fails_again_and_again_dies_and_says_so(folder: Path) -> None:
    engine = load_engine(folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1)

    def fail(batch: object, in_flight: object) -> torch.Tensor:
        raise RuntimeError("pretended")

    core_of(engine).runner.run = fail  # type: ignore[method-assign,assignment]
    for _ in range(3):
        with pytest.raises((EngineFault, EngineDead)):
            list(engine.generate("hello", params=GREEDY))
    with pytest.raises(EngineDead):
        list(engine.generate("hello", params=GREEDY))
    with pytest.raises(EngineDead):
        engine.check_health()
    assert engine.stats().dead and engine.stats().blocks_used == 0


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
async def test_an_abort_is_honoured_between_two_steps(folder: Path, phase: str) -> None:
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=1, num_threads=1,
        max_num_batched_tokens=1 if phase == "prefill" else 512,
    ) as engine:  # fmt: skip
        first = engine.stream("tell me", params=LONG, request_id="first")
        if phase == "waiting":
            await anext(first)
        prompt = "<image> " + "word " * 60
        gone = engine.stream(prompt, [PICTURE], LONG, request_id="gone")
        reading = asyncio.create_task(anext(gone))
        if phase == "decode":
            await reading
            reading = asyncio.create_task(anext(gone))
        else:
            scheduler = core_of(engine).scheduler
            line = scheduler.waiting if phase == "waiting" else scheduler.running
            while not any(seq.request_id == "gone" for seq in list(line)):
                await asyncio.sleep(0.001)
        core = core_of(engine)
        honoured: list[int] = []
        abort = core.abort

        def watched(request_id: str) -> list[GenerationDelta]:
            honoured.append(core.num_steps)
            return abort(request_id)

        core.abort = watched  # type: ignore[method-assign]
        asked = core.num_steps
        engine.abort("gone")
        with pytest.raises(RequestAborted):
            while True:
                await reading
                reading = asyncio.create_task(anext(gone))
        # The step under way when it was asked for, and perhaps one that began at that moment.
        assert honoured[0] - asked <= 2
        assert core.scheduler.find("gone") is None
        await first.aclose()
        settle(engine)


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: Engine) -> None:
    stream = engine.stream("tell me", params=GREEDY, request_id="mine")
    deltas = [await anext(stream)]
    with pytest.raises(InvalidRequest) as caught:
        await anext(engine.stream("me too", params=GREEDY, request_id="mine"))
    assert caught.value.field == "request_id"
    deltas += [delta async for delta in stream]
    assert deltas[-1].usage.completion_tokens == 12
    assert join(list(engine.generate("tell me", params=GREEDY, request_id="mine"))) == join(deltas)


def test_one_wrong_request_of_a_batch_takes_the_others_back(engine: Engine) -> None:
    with pytest.raises(InvalidRequest):
        engine.generate_batch([("tell me", []), ("tell me", []), ("<image>", [])], LONG)
    settle(engine)


def test_every_error_can_be_sent_to_another_process() -> None:
    for kind in _all_errors():
        given = ("prompt", "is empty") if issubclass(kind, InvalidRequest) else ("it is so",)
        error = kind(*given)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))


def _all_errors() -> list[type[TinyChatError]]:
    found, queue = [], [TinyChatError]
    while queue:
        found.append(queue.pop())
        queue += found[-1].__subclasses__()
    assert len(found) >= 9
    return found


async def test_a_thread_that_dies_leaves_nobody_waiting(folder: Path) -> None:
    """Not an exception of a step, which is survived: the loop itself is broken."""
    engine = load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=1, num_threads=1
    )

    def die(batch: object, in_flight: object) -> torch.Tensor:
        raise SystemExit

    running = engine.stream("tell me", params=LONG)
    await anext(running)
    waiting = asyncio.create_task(anext(engine.stream("me too", params=LONG)))
    while engine.stats().num_waiting < 1:
        await asyncio.sleep(0.001)
    core_of(engine).runner.run = die  # type: ignore[method-assign,assignment]
    for reading in (waiting, _rest(running)):
        with pytest.raises(EngineDead, match="the engine has died of SystemExit"):
            await reading
    assert engine.stats().dead and engine.stats().blocks_used == 0
    errors = []
    for _ in range(3):  # a health check may be asked for hours
        with pytest.raises(EngineDead) as caught:
            engine.check_health()
        errors.append(caught.value)
    frames = [len(list(traceback.walk_tb(error.__traceback__))) for error in errors]
    assert len({id(error) for error in errors}) == 3 and len(set(frames)) == 1
    engine.close()


async def _rest(stream: AsyncIterator[GenerationDelta]) -> list[GenerationDelta]:
    return [delta async for delta in stream]


async def test_closing_refuses_what_is_still_being_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller is told that the engine is dead, and not that he himself was cancelled."""
    engine = load_engine(folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1)
    prepare, go_on = engine._preparer.prepare, threading.Event()

    def slow(*args: object, **options: object) -> object:
        assert go_on.wait(10)
        return prepare(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(engine._preparer), "prepare", lambda self, *a, **o: slow(*a, **o))
    preparing = [asyncio.create_task(anext(engine.stream("hello"))) for _ in range(12)]
    await asyncio.sleep(0)
    engine.close()
    go_on.set()
    results = await asyncio.gather(*preparing, return_exceptions=True)
    assert [type(result) for result in results] == [EngineDead] * 12


async def test_closing_ends_what_is_left(folder: Path) -> None:
    engine = load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=1, num_threads=1
    )
    streams = [engine.stream("tell me", params=LONG) for _ in range(3)]
    await anext(streams[0])
    waiting = [asyncio.create_task(anext(stream)) for stream in streams[1:]]
    while engine.stats().num_waiting < 2:
        await asyncio.sleep(0.005)
    engine.close()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, EngineDead)
    with pytest.raises(EngineDead):
        async for _ in streams[0]:
            pass
    with pytest.raises(EngineDead):
        await anext(engine.stream("hello"))
    assert engine.stats().blocks_used == 0
    engine.close()


async def test_the_event_loop_is_never_blocked(engine: Engine) -> None:
    """Sixteen streams run; the loop is looked at every millisecond."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            worst = max(worst, time.monotonic() - before)

    watcher = asyncio.create_task(watch())

    async def consume() -> int:
        prompt = "<image> " + "word " * 50
        return len([d async for d in engine.stream(prompt, [PICTURE], GREEDY)])

    counts = await asyncio.gather(*(consume() for _ in range(16)))
    watcher.cancel()
    assert all(counts) and worst < 0.5
