"""`paced`: updates at the reader's pace, signs of life, nothing lost, nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from deployments.pacing import Update, paced
from models import GenerationDelta, Usage
from models.errors import EngineFault, InvalidRequest
from tests.unit.deployments.harness import NEVER_S, PATIENCE_S, delta, until

SHORT_S = 0.01


class Source:
    """An engine's iterator that yields what is pushed; None ends it, an exception is raised."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[GenerationDelta | Exception | None] = asyncio.Queue()
        self.started = False
        self.closed = False
        self.read = 0

    def push(self, *items: GenerationDelta | Exception | None) -> Source:
        for item in items:
            self.queue.put_nowait(item)
        return self

    async def deltas(self) -> AsyncGenerator[GenerationDelta, None]:
        self.started = True
        try:
            while (item := await self.queue.get()) is not None:
                self.read += 1
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await asyncio.sleep(0)  # a close that takes a while
            self.closed = True


def updates_of(source: Source, *, sign_of_life_s: float = NEVER_S) -> Any:
    return paced(source.deltas(), sign_of_life_s=sign_of_life_s)


async def next_of(updates: Any) -> Update:
    update = await asyncio.wait_for(anext(updates), PATIENCE_S)
    assert isinstance(update, Update)
    return update


async def collect(updates: Any) -> list[Update]:
    return [update async for update in updates]


async def test_each_update_has_what_came_since_the_one_before() -> None:
    source = Source().push(delta("A "))
    updates = updates_of(source)
    assert (await next_of(updates)).text == "A "
    source.push(delta("red "))
    assert (await next_of(updates)).text == "red "
    source.push(delta("circle"), delta(".", finish_reason="stop"), None)
    last = await next_of(updates)
    assert (last.text, last.finish_reason) == ("circle.", "stop")
    assert await collect(updates) == []
    assert source.closed


async def test_a_slow_reader_loses_nothing_and_does_not_hold_up_the_engine() -> None:
    words = [f"{n} " for n in range(50)]
    source = Source().push(delta("first "))
    updates = updates_of(source)
    assert (await next_of(updates)).text == "first "
    source.push(*map(delta, words), delta(finish_reason="stop"), None)
    await until(lambda: source.closed)  # read to its end while the reader sleeps
    assert [update.text for update in await collect(updates)] == ["".join(words)]


async def test_silence_is_filled_with_signs_of_life() -> None:
    source = Source()
    updates = updates_of(source, sign_of_life_s=SHORT_S)
    for _ in range(3):
        assert await next_of(updates) == Update("", Usage(), None)
    source.push(delta("word", completion_tokens=1))
    texts = []
    while "word" not in texts:
        texts.append((await next_of(updates)).text)
    assert set(texts) <= {"", "word"}
    assert (await next_of(updates)).text == ""
    await updates.aclose()


async def test_a_sign_of_life_carries_what_is_known_of_usage() -> None:
    source = Source().push(delta("", completion_tokens=3))  # tokens that make no letter yet
    updates = updates_of(source, sign_of_life_s=SHORT_S)
    while (update := await next_of(updates)).usage.completion_tokens == 0:
        assert update.text == ""
    assert (update.text, update.usage.completion_tokens) == ("", 3)
    await updates.aclose()


async def test_tokens_without_text_make_no_update_of_their_own() -> None:
    source = Source().push(delta(""), delta(""), delta("猫"), delta(finish_reason="stop"), None)
    got = await collect(updates_of(source))
    assert [update.text for update in got] == ["猫"]
    assert got[-1].finish_reason == "stop"


async def test_nothing_follows_the_update_with_the_finish_reason() -> None:
    """Not even a sign of life, however long the engine takes to put things away."""
    source = Source().push(delta("all", finish_reason="stop"))
    updates = updates_of(source, sign_of_life_s=SHORT_S)
    assert (await next_of(updates)).finish_reason == "stop"
    rest = asyncio.create_task(collect(updates))
    await asyncio.sleep(5 * SHORT_S)
    source.push(None)
    assert await asyncio.wait_for(rest, PATIENCE_S) == []
    assert source.closed


async def test_an_error_comes_after_all_the_text_before_it() -> None:
    source = Source().push(delta("half "), delta("an answer"), EngineFault("out of memory"))
    got = []
    with pytest.raises(EngineFault, match="out of memory"):
        async for update in updates_of(source):
            got.append(update)  # noqa: PERF401 - what came before the error counts
    assert "".join(update.text for update in got) == "half an answer"
    assert all(update.text for update in got)  # no empty update on the way out
    assert source.closed


async def test_an_error_before_any_text_is_the_only_thing_that_comes() -> None:
    updates = updates_of(Source().push(InvalidRequest("prompt", "is too long")))
    with pytest.raises(InvalidRequest):
        await next_of(updates)


async def test_an_error_of_the_preparation_is_raised() -> None:
    async def deltas() -> AsyncGenerator[GenerationDelta, None]:
        raise InvalidRequest("images[0]", "is empty")
        yield

    with pytest.raises(InvalidRequest):
        await collect(paced(deltas(), sign_of_life_s=NEVER_S))


async def test_preparation_counts_as_waiting() -> None:
    ready = asyncio.Event()
    source = Source().push(delta("word", finish_reason="stop"), None)

    async def deltas() -> AsyncGenerator[GenerationDelta, None]:
        await ready.wait()
        async for item in source.deltas():
            yield item

    updates = paced(deltas(), sign_of_life_s=SHORT_S)
    assert (await next_of(updates)).text == ""
    ready.set()
    assert [u.text for u in await collect(updates) if u.text] == ["word"]


@pytest.mark.parametrize("taken", [0, 1])
async def test_closing_it_closes_the_engines_iterator(taken: int) -> None:
    source = Source().push(delta("A "))
    async with aclosing(updates_of(source, sign_of_life_s=SHORT_S)) as updates:
        for _ in range(1 + taken):
            await next_of(updates)
        assert source.started
        assert not source.closed
    assert source.closed


async def test_closing_it_during_preparation_cancels_that() -> None:
    cancelled = asyncio.Event()

    async def deltas() -> AsyncGenerator[GenerationDelta, None]:
        try:
            await asyncio.sleep(NEVER_S)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("unreachable")
        yield

    updates: Any = paced(deltas(), sign_of_life_s=SHORT_S)
    async with aclosing(updates):
        await next_of(updates)
    assert cancelled.is_set()


@pytest.mark.parametrize("ticks", range(10))
async def test_a_cancellation_is_never_lost(ticks: int) -> None:
    """Whatever else happens in the same turn of the event loop: new text, here."""
    source = Source()
    got: list[Update] = []

    async def consume() -> None:
        async for update in updates_of(source):
            got.append(update)  # noqa: PERF401 - cancelled midway

    consumer = asyncio.create_task(consume())
    await until(lambda: source.started)
    source.push(delta("word"))
    for _ in range(ticks):
        await asyncio.sleep(0)
    consumer.cancel()
    await asyncio.wait([consumer], timeout=PATIENCE_S)
    assert consumer.cancelled()
    await until(lambda: source.closed)


async def test_an_error_that_nobody_waited_for_is_not_reported_as_forgotten() -> None:
    """The event loop would log it, traceback and all, for each client that leaves."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    source = Source().push(delta("word"))
    updates = updates_of(source)
    await next_of(updates)
    source.push(EngineFault("late"))
    await until(lambda: source.closed)
    await updates.aclose()
    del updates
    await asyncio.sleep(0)
    assert reports == []


async def test_no_task_is_left_behind() -> None:
    before = asyncio.all_tasks()
    source = Source().push(delta("A "))
    updates = updates_of(source, sign_of_life_s=SHORT_S)
    await next_of(updates)
    await next_of(updates)
    await updates.aclose()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
