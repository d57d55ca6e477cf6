"""The engine's thread and its faces: sync, async, batch; aborts, failures, closing."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import Engine, SamplingParams, load_engine
from models.engine.messages import GenerationDelta
from models.errors import EngineDead, EngineFault, InvalidRequest, RequestAborted, RequestTimeout
from tests.synthetic import write_tiny_llava

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_new_tokens=400, ignore_eos=True)
PICTURE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=4, num_threads=1
    ) as engine:
        yield engine
        settle(engine)


def settle(engine: Engine) -> None:
    """Waits for the engine to be idle, then asserts that every block has come back."""
    deadline = time.monotonic() + 10
    while (stats := engine.stats()).num_running + stats.num_waiting and not stats.dead:
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)
    assert stats.blocks_used == 0
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    engine._core.check_integrity()
    assert not engine._subscribers


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


def test_messages_can_be_pickled(engine: Engine) -> None:
    request = engine._preparer.prepare("a <image> b", [PICTURE], GREEDY)
    again = pickle.loads(pickle.dumps(request))
    assert again.token_ids == request.token_ids
    assert torch.equal(again.images[0].image.pixel_values, request.images[0].image.pixel_values)
    (delta, *_) = engine.generate("hello", params=GREEDY)
    assert pickle.loads(pickle.dumps(delta)) == delta
    error = pickle.loads(pickle.dumps(InvalidRequest("prompt", "is empty")))
    assert (error.field, str(error)) == ("prompt", "prompt: is empty")


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
    run = engine._core.runner.run
    calls = 0

    def fail_once(batch: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("pretended")
        return run(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._core.runner, "run", fail_once)
    with pytest.raises(EngineFault):
        [delta async for delta in engine.stream("hello", params=GREEDY)]
    assert join([d async for d in engine.stream("hello", params=GREEDY)])
    engine.check_health()


def test_an_engine_that_fails_again_and_again_dies_and_says_so(folder: Path) -> None:
    engine = load_engine(folder, precision="W16A16", device="cpu", dtype="float32")

    def fail(batch: object) -> torch.Tensor:
        raise RuntimeError("pretended")

    engine._core.runner.run = fail  # type: ignore[method-assign,assignment]
    for _ in range(3):
        with pytest.raises((EngineFault, EngineDead)):
            list(engine.generate("hello", params=GREEDY))
    with pytest.raises(EngineDead):
        list(engine.generate("hello", params=GREEDY))
    with pytest.raises(EngineDead):
        engine.check_health()
    assert engine.stats().dead and engine.stats().blocks_used == 0


async def test_closing_ends_what_is_left(folder: Path) -> None:
    engine = load_engine(folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=1)
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
