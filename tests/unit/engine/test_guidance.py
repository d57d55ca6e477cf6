"""Answers in the form that was asked for; and no guide, however mad, that stalls anybody."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models import Engine, GenerationDelta, Guide, SamplingParams, load_engine
from models.demo import DEMO_CHECKPOINT
from models.engine.guidance import CACHED_GUIDES, GuideCompiler, Matcher
from models.engine.process import ProcessHost
from models.errors import InvalidRequest
from models.prompts import Tokenizer, load_tokenizer
from models.prompts.huggingface import HuggingFaceTokenizer
from models.prompts.sentencepiece_ import SentencePieceTokenizer
from tests.tiny import tokenizer_model, write_tiny_llava

SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "colour": {"enum": ["red", "green", "blue é"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["sure", "colour", "count"],
    "additionalProperties": False,
}
GUIDES = {
    "schema": Guide("json_schema", json.dumps(SCHEMA)),
    "regex": Guide("regex", r"[a-f]{3}-[0-9]{2,4}(é|\n)?x"),
    "spaced": Guide("regex", " ?[xyz]{2}"),
    "choice": Guide("choice", json.dumps(["yes", "no", " maybe", 'say "é"'])),
}


def fits(kind: str, text: str) -> bool:
    if kind == "schema":
        value = json.loads(text)
        return (
            list(value) == ["sure", "colour", "count"]
            and isinstance(value["sure"], bool)
            and value["colour"] in SCHEMA["properties"]["colour"]["enum"]  # type: ignore[index]
            and 0 <= value["count"] <= 99
        )
    if kind == "choice":
        return text in json.loads(GUIDES["choice"].value)
    return re.fullmatch(GUIDES[kind].value, text) is not None


def byte_level() -> HuggingFaceTokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(['{"sure": true, "count": 12} yes no maybe é'] * 3, trainer)
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    )


TOKENIZERS = {
    "sentencepiece": lambda: SentencePieceTokenizer(tokenizer_model()),
    "byte level": byte_level,
    "metaspace": lambda: load_tokenizer(DEMO_CHECKPOINT),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(
    "text", ["plain words", '{"a": [1, 2]}', "é ü 漢字 🙂", "two  spaces\nand lines\t"]
)
def test_the_bytes_of_a_texts_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert found.decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b""
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**6) == b""


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> list[int]:
    mask = matcher.allowed()
    return [i for i in range(tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1]


@pytest.mark.parametrize("kind", GUIDES)
def test_random_walks_end_where_the_form_is_complete(tokenizer: Tokenizer, kind: str) -> None:
    """Whatever tokens are chosen, the decoded text has the form, and the end may come just then."""
    compiler = GuideCompiler(tokenizer, tokenizer.eos_token_ids)
    (eos,) = tokenizer.eos_token_ids
    for seed in range(12):
        matcher, ids = compiler.compile(GUIDES[kind]), []
        while not matcher.has_ended:
            choices = allowed(matcher, tokenizer)
            if eos in choices:
                assert fits(kind, tokenizer.decode(ids))
            token = choices[(seed * 7919 + len(ids) * 104729) % len(choices)]
            matcher.advance(token)
            ids.append(token)
            assert matcher.error is None and len(ids) < 500
        assert fits(kind, tokenizer.decode(ids)), tokenizer.decode(ids)


@pytest.fixture(scope="module", params=["tiny", "tiny in its own process", "demo"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder: Path = DEMO_CHECKPOINT
    if request.param != "demo":
        folder = write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava", awq=False)
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", max_num_seqs=8, num_threads=1,
        own_process="process" in request.param,
    ) as engine:  # fmt: skip
        yield engine


async def ask(engine: Engine, prompt: str = "hello", **params: Any) -> list[GenerationDelta]:
    return [delta async for delta in engine.stream(prompt, params=SamplingParams(**params))]


def text_of(deltas: list[GenerationDelta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_answers_have_their_forms_beside_unguided_ones(engine: Engine) -> None:
    free = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    expected = text_of(await ask(engine, **free))
    kinds = list(GUIDES) * 2
    guided = [
        ask(
            engine, f"question {n}", guide=GUIDES[kind], temperature=0 if n < 4 else 1.5, seed=n,
            max_new_tokens=400, ignore_eos=n % 2 == 0, min_tokens=n * 9 % 31,
        )
        for n, kind in enumerate(kinds)
    ]  # fmt: skip
    plain, *answers = await asyncio.gather(ask(engine, **free), *guided)
    assert text_of(plain) == expected
    for kind, deltas in zip(kinds, answers, strict=True):
        if kind == "schema" and deltas[-1].finish_reason == "length":
            continue  # blanks between JSON's tokens may go on for ever
        assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason is None
        assert fits(kind, text_of(deltas)), text_of(deltas)
    schemas = [d for kind, d in zip(kinds, answers, strict=True) if kind == "schema"]
    assert any(deltas[-1].finish_reason == "stop" for deltas in schemas)


async def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    deltas = await ask(engine, guide=Guide("json_object"), temperature=0, max_new_tokens=2)
    assert deltas[-1].finish_reason == "length"
    assert text_of(deltas).startswith("{")
    exact = await ask(engine, guide=Guide("regex", "x{3}"), temperature=0, max_new_tokens=64)
    tokens = sum(len(delta.token_ids) for delta in exact)
    again = await ask(engine, guide=Guide("regex", "x{3}"), temperature=0, max_new_tokens=tokens)
    assert (text_of(again), again[-1].finish_reason) == ("xxx", "stop")


async def test_logprobs_are_of_what_the_guide_allows(engine: Engine) -> None:
    deltas = await ask(engine, guide=GUIDES["choice"], temperature=0, logprobs=20)
    tokens = [token for delta in deltas for token in delta.token_ids]
    found = [logprobs for delta in deltas for logprobs in delta.logprobs]
    assert [logprobs.token_id for logprobs in found] == tokens
    for logprobs in found:
        assert logprobs.token_id == logprobs.top[0][0]
        assert sum(math.exp(value) for _, value in logprobs.top) == pytest.approx(1, abs=1e-3)


WRONG = {
    "no regex": ("regex", "(a"),
    "look-ahead": ("regex", "(?=a)b"),
    "injected": ("regex", "a)|(b"),
    "nothing matches": ("regex", "[a&&b]"),
    "unknown type": ("json_schema", '{"type": "colour"}'),
    "remote": ("json_schema", '{"$ref": "http://127.0.0.1/x"}'),
    "a file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "circular": ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_guide_that_is_wrong_is_refused(engine: Engine, case: str) -> None:
    guide = Guide(*WRONG[case])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        await ask(engine, guide=guide, max_new_tokens=4)
    assert caught.value.field == ("guide" if guide.kind == "regex" else "response_format")
    assert len(str(caught.value)) < 400 and "/work" not in str(caught.value)
    assert engine.stats().num_waiting == engine.stats().num_running == 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("xml", ""), ("json_schema", "{"), ("json_schema", "[]"), ("json_schema", "5"),
        ("json_schema", '{"a": ' * 65 + "1" + "}" * 65), ("regex", "(" * 65 + ")" * 65),
        ("json_schema", "[" * 60_000), ("regex", "a{1000000}"), ("regex", "a{" + "9" * 5000 + "}"),
        ("json_schema", '{"pattern": "^a{2001}$"}'), ("regex", "a" * 70_000), ("regex", "\ud800"),
        ("choice", "[]"), ("choice", '["a", 1]'), ("choice", '[""]'), ("choice", "a"),
        ("choice", json.dumps([str(i) for i in range(1025)])), ("regex", None),
    ],
)  # fmt: skip
def test_what_can_be_seen_at_once_is_refused_at_once(kind: Any, value: Any) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequest) as caught:
        Guide(kind, value)
    assert time.perf_counter() - started < 0.5 and len(str(caught.value)) < 300


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _doubling(keyword: str) -> dict[str, Any]:
    refs = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    return {"$defs": {**refs, "d30": {"type": "object"}}, "$ref": "#/$defs/d0"}


MAD: dict[str, Guide] = {
    **{
        name: Guide("json_schema", json.dumps(schema))
        for name, schema in {
            "deep": _deep(29),
            "wide": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}},
            "doubling allOf": _doubling("allOf"),
            "doubling anyOf": _doubling("anyOf"),
            "long": {"type": "string", "minLength": 10**9},
            "many": {"type": "array", "minItems": 10**9, "items": {"const": "ab"}},
            "constant": {"const": "ab" * 30_000},
            "pattern": {"type": "string", "pattern": "^(([a-z]{1,99}){1,99}){1,99}$"},
        }.items()
    },
    "nested repeats": Guide("regex", "((a{1,200}){1,200}){1,200}"),
    "optional": Guide("regex", "(a?){1000}a{1000}"),
    "exponential": Guide("regex", "(a|b)*a(a|b){500}"),
    "unicode": Guide("regex", r"(.*\p{L}.*){50}"),
    "stars": Guide("regex", "(" * 50 + "a" + ")*" * 50),
    "alternatives": Guide("regex", "|".join(f"w{i}x*" for i in range(8000))),
}


@pytest.mark.parametrize("name", MAD)
def test_a_mad_guide_is_compiled_or_refused_in_bounded_time(name: str) -> None:
    """Of the processor's: whatever else this machine is doing."""
    tokenizer = TOKENIZERS["metaspace"]()
    compiler = GuideCompiler(tokenizer, tokenizer.eos_token_ids)
    longest, started = 0.0, time.thread_time()
    try:
        matcher = compiler.compile(MAD[name])
    except InvalidRequest:
        return
    finally:
        assert time.thread_time() - started < 3
    for step in range(40):  # or it is refused on its way, by its limits
        if matcher.error is not None or matcher.has_ended:
            break
        begun = time.thread_time()
        choices = allowed(matcher, tokenizer)
        longest = max(longest, time.thread_time() - begun)
        if choices:
            matcher.advance(choices[step % len(choices)])
    assert longest < 0.5


def test_a_compile_leaves_the_interpreter_to_the_steps() -> None:
    """It runs in a thread, and would stall every stream if it held the lock meanwhile."""
    tokenizer = TOKENIZERS["metaspace"]()
    compiler = GuideCompiler(tokenizer, tokenizer.eos_token_ids)
    compiler.compile(GUIDES["choice"])  # builds the vocabulary
    compiled = threading.Event()
    future = compiler.submit(MAD["wide"], compiled.set)
    began = last = time.perf_counter()
    longest = 0.0
    while not compiled.is_set():
        time.sleep(0.0005)
        longest = max(longest, (now := time.perf_counter()) - last)
        last = now
    future.result()
    assert longest < (last - began) / 2


async def test_a_slow_compile_stalls_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(engine._host, ProcessHost):
        pytest.skip("the child's compiler cannot be slowed down from here")
    release = threading.Event()
    compile_ = GuideCompiler.compile

    def slow(self: GuideCompiler, guide: Guide) -> Matcher:
        release.wait(20)
        return compile_(self, guide)

    monkeypatch.setattr(GuideCompiler, "compile", slow)
    waiting = asyncio.create_task(ask(engine, guide=GUIDES["regex"], temperature=0))
    await asyncio.sleep(0.1)
    gone = engine.stream("hello", params=SamplingParams(guide=GUIDES["regex"]), request_id="gone")
    leaving = asyncio.create_task(anext(gone))
    await asyncio.sleep(0.1)
    assert len(await ask(engine, temperature=0, max_new_tokens=5, ignore_eos=True)) > 0
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    release.set()
    assert fits("regex", text_of(await waiting))


def test_the_cache_is_bounded_and_hands_out_beginnings() -> None:
    tokenizer = TOKENIZERS["metaspace"]()
    compiler = GuideCompiler(tokenizer, tokenizer.eos_token_ids)
    guide = Guide("choice", '["yes", "no"]')
    one = compiler.compile(guide)
    beginning = allowed(one, tokenizer)
    one.advance(beginning[0])
    assert allowed(compiler.compile(guide), tokenizer) == beginning
    for i in range(CACHED_GUIDES * 2):
        compiler.compile(Guide("regex", f"a{i}"))
    assert len(compiler._cache) == CACHED_GUIDES
