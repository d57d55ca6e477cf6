"""The figures that benchmarks report, of answers whose times are known."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.comparison import Plan, Results
from benchmarks.goals import ENGINE, HTTP, TRANSFORMERS, Goal, goals_of
from benchmarks.http_arm import Recording
from benchmarks.load import Answer, Round, make_questions


def answer(sent: float, *arrivals: tuple[float, int]) -> Answer:
    made = Answer(sent)
    for time, new_tokens in arrivals:
        made.arrived(time, new_tokens)
    return made


def test_an_answers_figures() -> None:
    one = answer(10.0, (10.5, 1), (10.7, 2), (11.1, 2))
    assert one.num_tokens == 5 and one.ended == 11.1
    assert one.first_token_s == pytest.approx(0.5)
    assert one.token_s == pytest.approx(0.6 / 4)
    assert [*one.waits_s()] == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_a_round_lasts_from_the_first_question_to_the_last_token() -> None:
    made = Round.of([answer(1.0, (1.5, 1), (2.0, 1)), answer(1.2, (2.2, 1), (3.0, 3))])
    assert made.tokens_per_s == pytest.approx(6 / 2)
    assert made.first_token_s == pytest.approx(0.75)


def test_no_two_questions_have_the_same_picture() -> None:
    asked = make_questions(0, 8)
    assert len({question.picture for question in asked}) == 8
    assert asked[3:5] == make_questions(3, 2)
    assert len({q.picture for q in make_questions(0, 4, same_picture=True)}) == 1


def test_records_are_found_in_chunks_cut_anywhere() -> None:
    body = [b'{"text": "a"}\0{"te', b'xt": "b"}\0', b'{"text": "c"}\0']
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in body)
    stream = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    loop = asyncio.new_event_loop()
    for size in (1, 7, len(stream)):
        recording = Recording(b"", loop.create_future())
        for start in range(0, len(stream), size):
            recording.data_received(stream[start : start + size])
        times, texts = zip(*recording.records(), strict=True)
        assert texts == (b'{"text": "a"}', b'{"text": "b"}', b'{"text": "c"}')
        assert sorted(times) == [*times]
    loop.close()


def test_goals_are_those_that_the_arms_can_tell() -> None:
    def rounds(tokens_per_s: float) -> list[Round]:
        return [Round(tokens_per_s, 0.01, 0.001, 0.04)] * 3

    plan = Plan((1, 8), 4, 3)
    results = Results(plan, {
        ENGINE: {1: rounds(100), 8: rounds(350)}, HTTP["launcher"]: {1: rounds(90), 8: rounds(300)},
    })  # fmt: skip
    goals = {goal.text: goal for goal in goals_of(results)}
    assert not any(TRANSFORMERS in text for text in goals)
    assert [goal.is_met for goal in goals.values()] == [True, False, True, True]
    assert str(Goal("speed", 2.0, 3.0, least=True)) == "MISSED speed: 2 (at least 3)"
