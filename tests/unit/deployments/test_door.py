"""The door: generations never exceed it, and control calls always find a place."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.door import RESERVE, Door, capacity, max_ongoing_requests, shrink
from models.errors import ConfigurationError, EngineOverloaded

ONGOING = st.integers(3, 5000)
SEQS = st.integers(1, 512)
WAITING = st.integers(0, 2048)


def fill(stack: ExitStack, door: Door) -> int:
    """Enters until it is full; how many that were."""
    entered = 0
    while True:
        try:
            stack.enter_context(door.enter())
        except EngineOverloaded:
            return entered
        entered += 1


def uploads(stack: ExitStack, door: Door) -> int:
    """Uploads until no more are let in; how many that were."""
    entered = 0
    while True:
        try:
            stack.enter_context(door.upload())
        except EngineOverloaded:
            return entered
        entered += 1


@given(SEQS, WAITING)
def test_the_default_never_shrinks(max_num_seqs: int, max_waiting: int) -> None:
    max_ongoing = max_ongoing_requests(max_num_seqs, max_waiting)
    assert shrink(max_ongoing, max_num_seqs, max_waiting) == (max_num_seqs, max_waiting)


@given(ONGOING, SEQS, WAITING)
def test_what_is_left_after_shrinking_fits_and_works(
    max_ongoing: int, max_num_seqs: int, max_waiting: int
) -> None:
    seqs, waiting = shrink(max_ongoing, max_num_seqs, max_waiting)
    assert 1 <= seqs <= max_num_seqs
    assert 0 <= waiting <= max_waiting
    assert seqs + waiting <= capacity(max_ongoing) < max_ongoing
    if seqs < max_num_seqs:
        assert waiting == 0  # those who wait go first
    if seqs + waiting < max_num_seqs + max_waiting:
        assert seqs + waiting == capacity(max_ongoing)  # and no more go than must


@given(ONGOING)
def test_a_reserve_stays_for_uploads_and_control_calls(max_ongoing: int) -> None:
    reserve = max_ongoing - capacity(max_ongoing)
    assert 2 <= reserve <= RESERVE


@given(st.integers(3, 4999))
def test_capacity_grows_with_what_serve_lets_in(max_ongoing: int) -> None:
    assert capacity(max_ongoing) <= capacity(max_ongoing + 1)


@pytest.mark.parametrize("max_ongoing", [-1, 0, 1, 2])
def test_too_small_a_door_is_refused_with_the_number_that_would_do(max_ongoing: int) -> None:
    with pytest.raises(ConfigurationError, match=r"max_ongoing_requests is .* at least 3.* 88 "):
        shrink(max_ongoing, 8, 64)
    assert shrink(3, 8, 64) == (1, 0)
    assert shrink(88, 8, 64) == (8, 64)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(3, 60))
def test_no_more_generations_than_the_limit_and_all_places_come_back(
    max_num_seqs: int, max_waiting: int, max_ongoing: int
) -> None:
    door = Door(max_num_seqs, max_waiting, lambda: max_ongoing)
    with ExitStack() as stack:
        entered = fill(stack, door)
        assert entered == door.count == door.limit
        assert entered <= max_num_seqs + max_waiting
    assert door.count == 0
    with ExitStack() as stack:
        assert fill(stack, door) == entered


@given(st.integers(3, 200))
def test_a_full_house_and_full_uploads_leave_room_for_a_status_call(max_ongoing: int) -> None:
    door = Door(1000, 1000, lambda: max_ongoing)
    with ExitStack() as stack:
        inside = fill(stack, door)
        uploading = uploads(stack, door)
        assert uploading >= 1  # an upload may still come, to be told that it is full
        assert inside + uploading < max_ongoing
    with ExitStack() as stack:
        assert uploads(stack, door) < max_ongoing  # nor do uploads alone fill the replica


def test_a_place_comes_back_after_an_error() -> None:
    door = Door(1, 0, lambda: 100)
    for enter in (door.enter, door.upload):
        for _ in range(200):
            with pytest.raises(KeyError), enter():
                raise KeyError
    assert door.count == 0


def test_a_refusal_takes_no_place() -> None:
    door = Door(1, 0, lambda: 100)
    with door.enter():
        for _ in range(3):
            with pytest.raises(EngineOverloaded, match="full"), door.enter():
                pass
        assert door.count == 1
    assert door.count == 0


def test_an_upload_is_no_generation() -> None:
    """`queue_length` tells controllers of work for the model, which an upload is not yet."""
    door = Door(1, 0, lambda: 100)
    with door.upload():
        assert door.count == 0
        with door.enter():
            assert door.count == 1


def test_the_limit_follows_what_serve_allows_while_serving() -> None:
    live = [100]
    door = Door(8, 8, lambda: live[0])
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(door.enter())
        live[0] = 8
        assert door.limit == 6
        with pytest.raises(EngineOverloaded), door.enter():
            pass
        assert door.count == 10  # those inside stay
        live[0] = 100
        stack.enter_context(door.enter())
    live[0] = 1
    assert door.limit == 1  # never closed for good


def test_a_request_of_several_answers_gets_all_its_places_or_none() -> None:
    changes: list[int] = []
    door = Door(2, 1, lambda: 100)
    door.on_change = lambda: changes.append(door.count)
    with door.enter(2):
        with pytest.raises(EngineOverloaded), door.enter(2):
            pass
        with door.enter():
            assert door.count == 3
    assert changes == [2, 3, 2, 0]
