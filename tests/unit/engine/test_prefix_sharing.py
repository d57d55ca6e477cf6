"""Nothing is computed twice: beginnings that requests share, one after another or side by side."""

from __future__ import annotations

import pytest

from models.engine.core import EngineCore
from models.engine.messages import GenerationRequest
from tests.unit.engine.harness import (
    BLOCK,
    Picture,
    alone,
    answers,
    build_core,
    request,
    run_all,
)

SYSTEM = [5 + i % 40 for i in range(40)]


class Counter:
    """Counts the tokens that a core computes from now on."""

    def __init__(self, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        run = core.runner.run

        def counted(batch, in_flight):  # type: ignore[no-untyped-def]
            self.tokens += sum(chunk.end - chunk.start for chunk in batch.chunks)
            return run(batch, in_flight)

        monkeypatch.setattr(core.runner, "run", counted)

    def take(self) -> int:
        """Those since the last time."""
        tokens, self.tokens = self.tokens, 0
        return tokens


def question(user: int, turn: int) -> list[int]:
    return [10 + (7 * user + 3 * turn + i) % 60 for i in range(6)]


@pytest.mark.parametrize("users", [1, 8])
@pytest.mark.parametrize("pictured", [False, True])
def test_a_turn_computes_what_is_new_and_at_most_a_block(
    users: int, pictured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four turns of several users' conversations, all users at once."""
    core = build_core(blocks=users * 32, seqs=users, budget=64)
    counter = Counter(core, monkeypatch)
    spans = {
        user: [(2, Picture(bytes([user + 1]) * 32, 9))] if pictured else [] for user in range(users)
    }
    histories = {user: [50 + user, *question(user, 9), 3, 4, 6, 7, 8] for user in range(users)}
    known = dict.fromkeys(range(users), 0)
    for turn in range(4):
        asked: dict[int, GenerationRequest] = {}
        for user, history in histories.items():
            history += question(user, turn)
            asked[user] = request(
                f"{user}", history, spans[user], max_new_tokens=5, ignore_eos=True
            )
            core.add(asked[user])
        given = answers(run_all(core))
        new = 0
        for user, req in asked.items():
            answer = given[f"{user}"]
            assert answer == alone(req)
            # An answer's last token comes out of the model, and goes into it only with the next
            # turn; each of the others is computed once.
            new += len(req.token_ids) + len(answer) - 1 - known[user]
            known[user] = len(req.token_ids) + len(answer) - 1
            histories[user] += answer
        computed = counter.take()
        assert new <= computed <= new + users * BLOCK, f"turn {turn}"
    assert core.runner.images.num_encoded == (users if pictured else 0)


def test_a_system_prompt_of_users_who_come_at_once_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = build_core(blocks=256, seqs=8, budget=512)
    counter = Counter(core, monkeypatch)
    asked = [request(f"{u}", SYSTEM + question(u, 0), max_new_tokens=1) for u in range(8)]
    for req in asked:
        core.add(req)
    given = answers(run_all(core))
    assert counter.take() == len(SYSTEM) + 8 * len(question(0, 0))
    for req in asked:
        assert given[req.request_id] == alone(req)


def test_a_picture_that_several_ask_about_at_once_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = build_core(blocks=256, seqs=8, budget=512)
    counter = Counter(core, monkeypatch)
    picture = Picture(b"p" * 32, 4 * BLOCK)
    for user in range(8):
        tokens = [*SYSTEM[: 4 * BLOCK], *question(user, 0)]
        core.add(request(f"{user}", tokens, [(0, picture)], max_new_tokens=1))
    run_all(core)
    assert core.runner.images.num_encoded == 1
    assert counter.take() == 4 * BLOCK + 8 * len(question(0, 0))


def test_nobody_waits_for_a_beginning_that_is_short_beside_the_rest() -> None:
    core = build_core(blocks=256, seqs=4, budget=512)
    for user in range(4):
        rest = [10 + (11 * user + i) % 70 for i in range(30)]
        core.add(request(f"{user}", SYSTEM[: 2 * BLOCK] + rest, max_new_tokens=1))
    assert {delta.request_id for delta in core.step()} == {"0", "1", "2", "3"}


def test_others_pass_the_one_that_waits_for_a_beginning() -> None:
    core = build_core(blocks=256, seqs=8, budget=64)
    core.add(request("leader", SYSTEM + question(0, 0), max_new_tokens=1))
    core.add(request("follower", SYSTEM + question(1, 0), max_new_tokens=1))
    core.add(request("other", [60, 61, 62], max_new_tokens=1))
    assert {delta.request_id for delta in core.step()} == {"leader", "other"}
    assert {delta.request_id for delta in core.step()} == {"follower"}


def test_a_follower_goes_on_when_its_leader_is_aborted() -> None:
    core = build_core(blocks=256, seqs=8, budget=16)
    core.add(request("leader", SYSTEM + question(0, 0)))
    follower = request("follower", SYSTEM + question(1, 0))
    core.add(follower)
    core.step()
    core.abort("leader")
    assert answers(run_all(core))["follower"] == alone(follower)


def test_different_pictures_at_the_same_place_share_only_what_is_before_them() -> None:
    core = build_core(blocks=256, seqs=1, budget=512)
    tokens = SYSTEM[: 3 * BLOCK] + question(0, 0)
    answers_by_picture = {}
    for name in (b"a", b"b"):
        asked = request(name.decode(), tokens, [(BLOCK, Picture(name * 32, BLOCK))])
        core.add(asked)
        deltas = run_all(core)
        answers_by_picture[name] = answers(deltas)[name.decode()]
        assert answers_by_picture[name] == alone(asked)
    assert deltas[-1].usage.cached_tokens == BLOCK
    assert core.runner.images.num_encoded == 2


def test_of_two_conversations_the_one_not_used_for_longest_is_cut_first_and_at_its_end() -> None:
    core = build_core(blocks=24, seqs=1, budget=512)
    old = [70, *SYSTEM[:30]]
    new = [71, *SYSTEM[:30]]
    third = [72, *SYSTEM]  # one block more than is free then
    for name, tokens in (("1", old), ("2", new), ("3", old), ("4", third)):
        core.add(request(name, tokens, max_new_tokens=1))
        run_all(core)
    cached = []
    for name, tokens in (("5", old), ("6", new)):
        core.add(request(name, tokens, max_new_tokens=1))
        (delta,) = run_all(core)
        cached.append(delta.usage.cached_tokens)
    assert cached == [7 * BLOCK, 6 * BLOCK]
