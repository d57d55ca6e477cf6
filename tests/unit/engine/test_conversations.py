"""Conversations of several users, interleaved: shared beginnings change no answer, whatever is
evicted, and even if the keys of the blocks collide."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.block_pool import BlockContent
from models.engine.messages import GenerationDelta, GenerationRequest
from tests.unit.engine.harness import Picture, alone, answers, build_core, request, run_all

SYSTEM = [5 + i % 40 for i in range(10)]
PICTURES = [Picture(bytes([i]), 6) for i in (1, 2)]
whole_key = BlockContent.key


def short_key(content: BlockContent, parent: bytes) -> bytes:
    """One of four: nearly every other block collides."""
    return bytes([whole_key(content, parent)[0] % 4])


@settings(max_examples=25)
@given(st.data())
def test_shared_beginnings_change_no_answer(data: st.DataObject) -> None:
    core = build_core(
        blocks=data.draw(st.integers(24, 60), "blocks"),
        seqs=data.draw(st.integers(1, 4), "seqs"),
        budget=data.draw(st.integers(4, 32), "budget"),
        slowdown=data.draw(st.sampled_from([None, 0.01]), "slowdown"),
    )
    # The same tokens with one picture, with the other, and without any.
    seen = [data.draw(st.sampled_from([None, *PICTURES]), "picture") for _ in range(3)]
    histories = [[*SYSTEM, *[9] * 6, 7, 8] for _ in seen]
    key = short_key if data.draw(st.booleans(), "keys collide") else whole_key
    with patch.object(BlockContent, "key", key):
        for turn in range(data.draw(st.integers(1, 3), "turns")):
            asked: dict[int, GenerationRequest] = {}
            deltas: list[GenerationDelta] = []
            for user in data.draw(st.permutations(range(3)), "order"):
                histories[user] += data.draw(st.sampled_from([[11], [12, 13, 14]]), "question")
                picture = seen[user]
                spans = [(len(SYSTEM), picture)] if picture else []
                asked[user] = request(f"{user} {turn}", histories[user], spans, max_new_tokens=6)
                core.add(asked[user])
                for _ in range(data.draw(st.integers(0, 2), "steps before the next")):
                    deltas += core.step()
            got = answers(deltas + run_all(core))
            for user, req in asked.items():
                assert got[req.request_id] == alone(req)
                histories[user] += got[req.request_id]
