"""How likely the tokens of prompts were, for the requests that ask (`prompt_logprobs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import numpy as np
import torch
from torch import Tensor

from models.engine.messages import PromptToken
from models.engine.scheduler import Chunk
from models.engine.sequence import Sequence
from models.transfer import upload

ROWS_AT_A_TIME = 64
"""So many distributions over the vocabulary are in memory at once."""


def score_prompts(
    chunks: Iterable[Chunk], hidden: Tensor, logits: Callable[[Tensor], Tensor]
) -> None:
    """Gives the sequences that ask for it what their chunks tell of their prompts. Waits for the
    device if there are any, and costs nothing if there are none.

    Args:
        hidden: (tokens of all chunks, hidden size), the decoder's output.
        logits: (rows, hidden size) -> (rows, vocabulary), float32.
    """
    row = 0
    for chunk in chunks:
        length = chunk.end - chunk.start
        if chunk.seq.params.prompt_logprobs is not None:
            _score(chunk, hidden[row : row + length], logits)
        row += length


def _score(chunk: Chunk, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
    """Each row tells of the token behind it. What was computed before a preemption is known."""
    seq = chunk.seq
    first = max(seq.num_scored, 1)
    end = min(chunk.end + 1, seq.num_prompt_tokens)
    scores = [_unscored(seq, at) for at in range(seq.num_scored, end)]
    positions = [at for at in range(first, end) if seq.token_ids[at] >= 0]  # others: pictures'
    for start in range(0, len(positions), ROWS_AT_A_TIME):
        piece = np.array(positions[start : start + ROWS_AT_A_TIME])
        rows = logits(hidden[upload(piece - 1 - chunk.start, hidden.device)])
        tokens = [seq.token_ids[at] for at in piece]
        found = scores_of(rows, tokens, seq.params.prompt_logprobs or 0)
        for at, score in zip(piece, found, strict=True):
            scores[at - seq.num_scored] = score
    seq.add_scores(scores)


def _unscored(seq: Sequence, position: int) -> PromptToken:
    token = seq.token_ids[position]
    return PromptToken(token if token >= 0 else None)


def scores_of(logits: Tensor, tokens: list[int], num_top: int) -> list[PromptToken]:
    """What each row of (tokens, vocabulary) logits says of its token."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, upload(tokens, logits.device).unsqueeze(1))
    ranks = (logprobs > own).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    # One transfer, in which token ids are exact.
    columns = [own, ranks.unsqueeze(1), ids, values]
    lines = torch.cat([column.double() for column in columns], dim=1).tolist()
    width = ids.shape[1]
    return [
        PromptToken(
            token,
            line[0],
            int(line[1]),
            tuple(
                (int(i), value)
                for i, value in zip(line[2 : 2 + width], line[2 + width :], strict=True)
                if value > -inf
            ),
        )
        for token, line in zip(tokens, lines, strict=True)
    ]
