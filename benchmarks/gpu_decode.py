"""Whole models at their real sizes: speed, first token, next turn, memory; beside transformers'
`generate` in fp16, and beside what the device could do at most.

Figures are of `models.load_engine`, asked through its public methods by this process: preparing
pictures and text is in the first token's time, and counted apart too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.goals import Goal
from benchmarks.gpu_limits import Limits, ModelCost
from benchmarks.gpu_models import MODELS, LoadedEngine, checkpoint, free_memory, peak_memory
from benchmarks.gpu_parts import Case, Figures, Part, Setting
from benchmarks.gpu_transformers import Transformers
from benchmarks.prefix import Words
from benchmarks.prefix import measure as measure_turn
from benchmarks.streams import PROMPT, ask, noise
from models import Engine, SamplingParams
from models.checkpoints import open_checkpoint
from models.prompts import load_tokenizer

GOAL_MODEL = "llava-v1.5-7b"
FIRST_TOKEN = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
WARM_UP = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
FIRST_TOKEN_TEXT = 64
"""Tokens beside the picture."""
ONE_STREAM_SHARE = 500 / 1083
"""Of the limit: the issue's 500 tokens per second where the limit is 1,083."""
ONE_STREAM_H200 = 500.0
MANY_STREAMS_SHARE = 0.6
FIRST_TOKEN_FACTOR = 2.5


class Sizes:
    """What is asked, by the scale."""

    def __init__(self, setting: Setting) -> None:
        full = setting.scale == "full"
        self.streams = (1, 8, 32, 64) if full else (1, 4)
        self.tokens = 192 if full else 24
        self.transformers_tokens = 48 if full else 8
        self.history = 1024 if full else 64
        self.repeats = 5 if full else 2
        self.options: dict[str, Any] = {
            "max_num_seqs": max(self.streams),
            "max_model_len": 2048 if full else 512,
            "max_prefill_slowdown": None,  # else the first stream would end before the last begins
        }
        if not setting.is_gpu:
            self.options["kv_cache_bytes"] = 64 << 20


class DecodePart(Part):
    name = "decode"
    seconds = 300.0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sizes = Sizes(setting)
        self._loaded = LoadedEngine(setting)
        self._peer: Transformers | None = None
        self._peer_model = ""
        self._limits: Limits | None = None

    def cases(self) -> Mapping[str, Case]:
        cases: dict[str, Case] = {}
        for model in MODELS:
            cases[f"{model}, loading"] = lambda model=model: self._loading(model)
            for streams in self._sizes.streams:
                cases[_speed(model, streams)] = (
                    lambda model=model, streams=streams: self._speed(model, streams)
                )  # fmt: skip
            cases[_first(model)] = lambda model=model: self._first_token(model)
            cases[f"{model}, next turn"] = lambda model=model: self._next_turn(model)
        for model in MODELS:
            for streams in self._sizes.streams:
                cases[_peer(_speed(model, streams))] = (
                    lambda model=model, streams=streams: self._peer_speed(model, streams)
                )  # fmt: skip
            cases[_peer(_first(model))] = lambda model=model: self._peer_first_token(model)
        return cases

    def goals(self, cases: Mapping[str, Figures]) -> Iterator[Goal]:
        one = cases.get(_speed(GOAL_MODEL, 1))
        if one is not None:
            if self.setting.is_gpu and "H200" in torch.cuda.get_device_name():
                yield Goal(
                    f"{GOAL_MODEL}, one stream", one["tokens_per_s"], ONE_STREAM_H200,
                    " tokens/s", least=True,
                )  # fmt: skip
            yield Goal(
                f"{GOAL_MODEL}, one stream / limit", one["share of limit"],
                round(ONE_STREAM_SHARE, 3), least=True,
            )  # fmt: skip
        many = cases.get(_speed(GOAL_MODEL, max(self._sizes.streams)))
        if many is not None:
            yield Goal(
                f"{GOAL_MODEL}, {max(self._sizes.streams)} streams / limit",
                many["share of limit"], MANY_STREAMS_SHARE, least=True,
            )  # fmt: skip
        first = cases.get(_first(GOAL_MODEL))
        if first is not None:
            yield Goal(
                f"{GOAL_MODEL}, first token / limit", first["times limit"], FIRST_TOKEN_FACTOR
            )

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        yield "| model | streams | tokens/s | limit | share | transformers | ratio | peak, GB |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for model in MODELS:
            for streams in self._sizes.streams:
                own = cases.get(_speed(model, streams))
                if own is None:
                    continue
                peer = cases.get(_peer(_speed(model, streams)), {}).get("tokens_per_s")
                yield (
                    f"| {model} | {streams} | {own['tokens_per_s']:.0f} | {own['limit']:.0f} | "
                    f"{own['share of limit']:.2f} | {_or_dash(peer, '.0f')} | "
                    f"{_or_dash(peer and own['tokens_per_s'] / peer, '.2f')} | "
                    f"{_or_dash(own.get('peak_gb'), '.1f')} |"
                )
        yield ""
        yield (
            "| model | first token, ms | of it preparing | limit | times | transformers, "
            "prepared | turn unknown, ms | known |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for model in MODELS:
            own = cases.get(_first(model))
            if own is None:
                continue
            peer = cases.get(_peer(_first(model)), {}).get("first_token_s")
            turn = cases.get(f"{model}, next turn", {})
            cells = (peer, turn.get("cold_s"), turn.get("warm_s"))
            yield (
                f"| {model} | {own['first_token_s'] * 1e3:.1f} | {own['prepare_s'] * 1e3:.1f} | "
                f"{own['limit_s'] * 1e3:.2f} | {own['times limit']:.1f} | "
                + " | ".join(_or_dash(cell and cell * 1e3, ".1f") for cell in cells)
                + " |"
            )
        yield ""
        for model in MODELS:
            own = cases.get(f"{model}, loading")
            if own is not None:
                yield (
                    f"- {model}: loaded in {own['load_s']:.1f} s, backend {own['backend']}, KV "
                    f"cache {own['kv_cache']}"
                )

    def close(self) -> None:
        self._loaded.close()
        self._peer = None

    # ---- the cases --------------------------------------------------------------------------

    def _loading(self, model: str) -> Figures:
        engine = self._engine(model)
        figures: Figures = {"load_s": self._loaded.load_s, **engine.description()}
        if self.setting.is_gpu:
            figures["allocated_gb"] = torch.cuda.memory_allocated() / 1e9
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return figures

    def _speed(self, model: str, streams: int) -> Figures:
        engine = self._engine(model)
        # What is compiled, captured or tuned at the first use, is so now.
        engine.generate_batch([(PROMPT, [picture]) for picture in noise(streams)], WARM_UP)
        with peak_memory(self.setting) as memory:
            answered = asyncio.run(ask(engine, noise(streams), self._sizes.tokens))
        cost = ModelCost.of(engine.spec)
        limit = streams / cost.decode(streams, answered.context).seconds(self._measured())
        return {
            "tokens_per_s": answered.tokens_per_s,
            "limit": limit,
            "share of limit": answered.tokens_per_s / limit,
            "first_token_s": median(answered.first_token_s),
            "context": answered.context,
            **memory,
        }

    def _first_token(self, model: str) -> Figures:
        engine = self._engine(model)
        prompt, tokens = self._prompt(model), 0
        totals, preparations = [], []
        for _ in range(self._sizes.repeats + 1):
            (picture,) = noise(1)
            asked = time.monotonic()
            (delta,) = engine.generate(prompt, [picture], FIRST_TOKEN)
            totals.append(time.monotonic() - asked)
            assert delta.timing is not None
            preparations.append(delta.timing.queued - asked)
            tokens = delta.usage.prompt_tokens
        limit = ModelCost.of(engine.spec).first_token_s(tokens, 1, self._measured())
        # The first is a warm-up. The text is new to the prefix cache behind each new picture.
        total, preparation = median(totals[1:]), median(preparations[1:])
        return {
            "first_token_s": total,
            "prepare_s": preparation,
            "limit_s": limit,
            "times limit": total / limit,
            "times limit, prepared": (total - preparation) / limit,
            "prompt_tokens": tokens,
        }

    def _next_turn(self, model: str) -> Figures:
        engine = self._engine(model)
        return asdict(
            measure_turn(engine, self._sizes.history, True, 2, self.setting.kind)
        )  # fmt: skip

    def _peer_speed(self, model: str, streams: int) -> Figures:
        peer = self._transformers(model)
        peer.generate(streams, 2)
        with peak_memory(self.setting) as memory:
            generated = peer.generate(streams, self._sizes.transformers_tokens)
        return {**asdict(generated), **memory}

    def _peer_first_token(self, model: str) -> Figures:
        peer, prompt = self._transformers(model), self._prompt(model)
        peer.generate(1, 2, prompt)
        return {"first_token_s": peer.first_token_s(prompt, self._sizes.repeats)}

    # ---- what they use ----------------------------------------------------------------------

    def _engine(self, model: str) -> Engine:
        self._peer = None
        self._measured()  # before an engine takes the memory that it needs
        return self._loaded.of(self._folder(model), **self._sizes.options)

    def _transformers(self, model: str) -> Transformers:
        if self._peer is None or self._peer_model != model:
            self._loaded.close()
            self._peer = None
            free_memory(self.setting)
            self._peer = Transformers(self._folder(model), self.setting.device)
            self._peer_model = model
        return self._peer

    def _prompt(self, model: str) -> str:
        """A picture and 64 tokens."""
        spec = open_checkpoint(self._folder(model)).spec
        tokenizer = load_tokenizer(spec.tokenizer_path, spec.prompt.tokenization)
        return "<image>\n" + Words(tokenizer.encode, seed=0).text(FIRST_TOKEN_TEXT)

    def _folder(self, model: str) -> Path:
        return checkpoint(self.setting, model)

    def _measured(self) -> Limits:
        if self._limits is None:
            self._limits = Limits.of(self.setting)
        return self._limits


def _speed(model: str, streams: int) -> str:
    return f"{model}, {streams} stream{'s' if streams > 1 else ''}"


def _first(model: str) -> str:
    return f"{model}, first token"


def _peer(case: str) -> str:
    return f"{case}, transformers"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
