"""How well answers are known while training, from whole batches.

An answer whose every token is the likeliest after the true ones before it is exactly what greedy
decoding gives, so no decoding is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer

from models.demo.network import Batch, Network
from models.demo.packing import NO_TARGET
from models.demo.tokenizer import END


@torch.no_grad()
def exact_matches(
    network: Network, batch: Batch, tokenizer: Tokenizer
) -> Mapping[str, Sequence[bool]]:
    """Whether each answer is known, by the answer (those that name objects, by their number)."""
    predicted = network.predict(Batch(batch.pixels.float(), *batch[1:])).tolist()
    matches: dict[str, list[bool]] = defaultdict(list)
    answer: list[int] = []
    right = True
    for target, token in zip(batch.target.tolist(), predicted, strict=True):
        if target == NO_TARGET:
            break
        answer.append(target)
        right = right and token == target
        if target == END:
            matches[_group(tokenizer.decode(answer))].append(right)
            answer, right = [], True
    return matches


def table(matches: Mapping[str, Sequence[bool]], worst: int = 14) -> str:
    """The share of all, and of the answers that are known worst."""
    total = [one for group in matches.values() for one in group]
    ordered = sorted(matches.items(), key=lambda item: sum(item[1]) / len(item[1]))
    listed = ", ".join(
        f"{group} {sum(found) / len(found):.0%} of {len(found)}" for group, found in ordered[:worst]
    )
    return f"{sum(total) / max(1, len(total)):.1%} of {len(total)} answers known; {listed}"


def _group(answer: str) -> str:
    if answer.startswith("The image shows a"):
        return f"objects: {1 + answer.count(',') + answer.count(' and ')}"
    if answer.startswith(("The image shows the number", "The number is")):
        return "a number"
    if answer.startswith("There is no "):
        return "There is no ..."
    return answer
