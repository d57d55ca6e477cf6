"""Several streams of updates as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.openai.merging import merged
from deployments.pacing import Update
from models import Usage
from models.errors import EngineFault
from tests.unit.deployments.harness import NEVER_S, PATIENCE_S


class Source:
    """Yields texts, and waits or raises where it is told to."""

    def __init__(self, *steps: str | Exception | float) -> None:
        self.steps = steps
        self.closed = False

    async def updates(self) -> AsyncIterator[Update]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield Update(step, Usage(), None)
        finally:
            self.closed = True


def together(*sources: Source) -> Any:
    return merged([source.updates() for source in sources])


@pytest.mark.parametrize("count", [1, 3])
async def test_each_streams_updates_come_in_their_order(count: int) -> None:
    sources = [Source(*f"abc{i}") for i in range(count)]
    found = [(index, update.text) async for index, update in together(*sources)]
    for i in range(count):
        assert [text for index, text in found if index == i] == list(f"abc{i}")
    assert all(source.closed for source in sources)


async def test_they_do_not_wait_for_each_other() -> None:
    slow, quick = Source("a", NEVER_S), Source("b", "c")
    stream = together(slow, quick)
    texts = {(await asyncio.wait_for(anext(stream), PATIENCE_S))[1].text for _ in range(3)}
    assert texts == {"a", "b", "c"}
    await stream.aclose()
    assert slow.closed


@pytest.mark.parametrize("count", [1, 3])
async def test_an_error_ends_all_of_them(count: int) -> None:
    others = [Source("a", NEVER_S) for _ in range(count - 1)]
    with pytest.raises(EngineFault):
        async for _ in together(Source("b", EngineFault("broken")), *others):
            pass
    assert all(source.closed for source in others)


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_it_closes_all_of_them(count: int) -> None:
    sources = [Source("a", NEVER_S) for _ in range(count)]
    stream = together(*sources)
    for _ in range(count):
        await anext(stream)
    await stream.aclose()
    assert all(source.closed for source in sources)
