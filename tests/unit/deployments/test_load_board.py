"""Whose load counts."""

from __future__ import annotations

import asyncio

from deployments.load_board import ApplicationLoad, LoadBoard
from deployments.load_reporter import LoadReporter


def test_loads_add_up_and_the_latest_report_of_each_counts() -> None:
    board = LoadBoard(silence_s=5)
    board.report("a", 3, now=0)
    board.report("b", 4, now=1)
    board.report("a", 1, now=2)
    assert board.load(now=2) == ApplicationLoad(queue_length=5, replicas=2)


def test_a_silent_replica_is_forgotten_and_one_that_leaves_at_once() -> None:
    board = LoadBoard(silence_s=5)
    board.report("killed", 9, now=0)
    board.report("alive", 2, now=4)
    assert board.load(now=5.1) == ApplicationLoad(2, 1)
    board.leave("alive")
    board.leave("unknown")
    assert board.load(now=5.2) == ApplicationLoad(0, 0)


async def test_a_replica_adds_its_own_count_of_now_to_the_others_of_late() -> None:
    own = 2

    async def report(count: int) -> ApplicationLoad:
        return ApplicationLoad(count + 7, 3)

    reporter = LoadReporter(report, lambda: own)
    while reporter.load().replicas != 3:
        await asyncio.sleep(0)
    own = 5
    assert reporter.load() == ApplicationLoad(12, 3)
    await reporter.close()


async def test_without_a_link_that_answers_a_replica_counts_itself() -> None:
    asked = 0

    async def report(_: int) -> ApplicationLoad:
        nonlocal asked
        asked += 1
        raise ConnectionError

    reporter = LoadReporter(report, lambda: 4)
    reporter.changed()
    while asked < 2:
        await asyncio.sleep(0.01)
    assert reporter.load() == ApplicationLoad(4, 1)
    await reporter.close()


async def test_a_change_is_reported_before_the_next_second() -> None:
    counts: list[int] = []
    count = 0

    async def report(value: int) -> ApplicationLoad:
        counts.append(value)
        return ApplicationLoad(value, 1)

    reporter = LoadReporter(report, lambda: count)
    while not counts:
        await asyncio.sleep(0)
    count = 1
    reporter.changed()
    while len(counts) < 2:
        await asyncio.sleep(0.01)
    assert counts == [0, 1]
    await reporter.close()
