"""Log-probabilities of prompts as clients take them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from deployments.openai.token_names import TokenNames, finite
from models import PromptToken

CONTINUES = 0b10
"""How each byte of a character in UTF-8 begins, but for the first."""


def by_token_id(
    tokens: Sequence[PromptToken], num_top: int, names: TokenNames
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of each position the token that is there, and the likeliest ones;
    None for the first one and inside of pictures."""

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": names.text(token_id)}

    written: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.token_id is None or token.logprob is None:
            written.append(None)
            continue
        own = {str(token.token_id): entry(token.token_id, token.logprob, token.rank)}
        top = enumerate(token.top[:num_top], start=1)
        written.append(own | {str(i): entry(i, value, rank) for rank, (i, value) in top})
    return written


def offsets(prompt: str, tokens: Sequence[PromptToken], names: TokenNames) -> list[int]:
    """Where in the prompt each of its tokens begins, in characters.

    Counted from the end, since tokenizers add to the beginning: a token of its own, or a space.
    """
    raw = prompt.encode()
    begun = accumulate(int(byte >> 6 != CONTINUES) for byte in raw)
    character_at = [*(number - 1 for number in begun), len(prompt)]
    sizes = [0 if t.token_id is None else len(names.bytes(t.token_id)) for t in tokens]
    ends = accumulate(sizes[::-1])
    return [character_at[max(0, len(raw) - size)] for size in ends][::-1]
