"""A process that answers with `models.load_engine`, and nothing around it.

python -m benchmarks.engine_arm MODEL_PATH OPTIONS     JSON: `load_engine`'s
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from benchmarks.load import Question
from benchmarks.piped_arm import Outbox, serve
from models import SamplingParams, load_engine


class EngineModel:
    def __init__(self, model_path: str, options: Mapping[str, Any]) -> None:
        self._engine = load_engine(model_path, **options)
        self._loop = asyncio.new_event_loop()

    def answer(self, questions: Sequence[Question], num_tokens: int, outbox: Outbox) -> None:
        self._loop.run_until_complete(self._answer_all(questions, num_tokens, outbox))

    async def _answer_all(
        self, questions: Sequence[Question], num_tokens: int, outbox: Outbox
    ) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
        await asyncio.gather(*(self._answer(n, q, params, outbox) for n, q in enumerate(questions)))

    async def _answer(
        self, number: int, question: Question, params: SamplingParams, outbox: Outbox
    ) -> None:
        picture = Image.open(io.BytesIO(question.picture))
        async for delta in self._engine.stream(question.prompt, [picture], params):
            if outbox.is_empty:  # the other streams' tokens of this step come in the same turn
                self._loop.call_soon(outbox.flush)
            outbox.add(number, len(delta.token_ids))


if __name__ == "__main__":
    serve(partial(EngineModel, sys.argv[1], json.loads(sys.argv[2])))
