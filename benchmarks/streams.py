"""Questions about pictures of noise, asked of an engine all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from PIL import Image

from models import SamplingParams, Usage

if TYPE_CHECKING:
    from models import Engine

PROMPT = "USER: <image>\nWhat is in this picture, and what is it for? ASSISTANT:"
SIZE = (336, 448, 3)
"""Height, width and channels of a picture."""


@dataclass(frozen=True)
class Answered:
    """
    Attributes:
        first_token_s: of each stream.
        tokens_per_s: of all streams, from when all have their first token to when one ends.
        prompt_tokens: of one stream.
        context: tokens that a stream's new token attends to, the mean over that time.
    """

    first_token_s: list[float]
    tokens_per_s: float
    prompt_tokens: int
    context: float


def noise(count: int) -> list[Image.Image]:
    """Pictures that no cache knows."""
    import torch

    return [
        Image.fromarray(torch.randint(0, 256, SIZE, dtype=torch.uint8).numpy())
        for _ in range(count)
    ]


async def ask(
    engine: Engine, pictures: Sequence[Image.Image], tokens: int, prompt: str = PROMPT
) -> Answered:
    """One stream for each picture. Answers are `tokens` long, at least two; where prompts take
    many steps, they must be long enough for the first stream to run until the last one begins."""
    params = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
    usages: list[Usage] = []

    async def answer(picture: Image.Image) -> list[float]:
        times: list[float] = []
        async for delta in engine.stream(prompt, [picture], params):
            times += [time.monotonic()] * len(delta.token_ids)
            last = delta
        usages.append(last.usage)
        return times

    asked = time.monotonic()
    arrivals = await asyncio.gather(*map(answer, pictures))
    all_running = max(times[0] for times in arrivals)
    ends = min(times[-1] for times in arrivals)
    if ends <= all_running:
        raise RuntimeError(f"a stream of {tokens} tokens ended before the last one began")
    within = [[all_running < moment <= ends for moment in times] for times in arrivals]
    prompt_tokens = usages[0].prompt_tokens
    places = [place for flags in within for place, inside in enumerate(flags) if inside]
    return Answered(
        [times[0] - asked for times in arrivals],
        sum(map(sum, within)) / (ends - all_running),
        prompt_tokens,
        prompt_tokens + mean(places),
    )
