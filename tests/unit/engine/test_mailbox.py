"""The reader gets everything, in order, with as few wake-ups as it can do with."""

from __future__ import annotations

import asyncio
import threading
import time

from models.engine.mailbox import Mailbox
from models.engine.messages import GenerationDelta
from models.errors import EngineFault


def delta(text: str, token: int = 0, **more: object) -> GenerationDelta:
    return GenerationDelta("r", text, (token,), **more)  # type: ignore[arg-type]


async def test_what_has_gathered_comes_at_once_and_an_error_by_itself() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    fault = EngineFault("x")
    for item in (delta("a"), delta("b"), GenerationDelta("r", finish_reason="error", error=fault)):
        mailbox.put(item)
    assert (await mailbox.take()).text == "ab"
    assert (await mailbox.take()).error is fault


async def test_only_a_reader_that_waits_is_woken() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    assert not mailbox.put(delta("a"))
    await mailbox.take()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    assert mailbox.put(delta("b"))
    mailbox.ring()
    assert (await reader).text == "b"
    assert not mailbox.put(delta("c"))


async def test_a_thread_that_writes_and_a_loop_that_reads_lose_nothing() -> None:
    loop = asyncio.get_running_loop()
    mailbox = Mailbox(loop)
    total = 2000

    def write() -> None:
        for index in range(total):
            last = index == total - 1
            if mailbox.put(delta("x", index, finish_reason="length" if last else None)):
                loop.call_soon_threadsafe(mailbox.ring)
            if index % 97 == 0:
                time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    tokens: list[int] = []
    takes = 0
    while True:
        taken = await asyncio.wait_for(mailbox.take(), 10)
        takes += 1
        tokens += taken.token_ids
        if taken.finish_reason is not None:
            break
        await asyncio.sleep(0.002)  # busy with something else
    writer.join()
    assert tokens == list(range(total))
    assert takes < total / 4
