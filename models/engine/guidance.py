"""Which tokens may come next, so that an answer gets the form that its request asks for.

llguidance does the matching: it compiles lazily, in a millisecond for usual schemas, and computes
a mask in microseconds; its work and memory are bounded by counters that the caller sets, at
compile time and at every step, with an error where one runs out. xgrammar's masks cost the same;
its compiles were as fast or slower (2,000 properties: 0.42 s against 0.25 s), have no such bound,
and its wheel is twice as large.

A guide is compiled in a thread beside the engine's, while the scheduler passes its request over;
both hosts work alike, and a child process never waits for a compile either.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.engine.guide import Guide
from models.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from models.prompts import Tokenizer

COMPILE_THREADS = 2
CACHED_GUIDES = 32
WHITESPACE = "( |\\n {0,32})?"
"""Between a JSON text's tokens: as it is usually written, on one line or indented. Were any amount
allowed, a model that was never taught JSON would write spaces until its answer is full."""
LONGEST_FORCED = 64
"""Bytes of a text with no alternative that are cut into tokens at a time."""


class Matcher:
    """One answer's place in its guide. Kept where the answer is, whatever is recomputed of it."""

    def __init__(self, matcher: LLMatcher, guide: Guide) -> None:
        self._matcher = matcher
        self._guide = guide

    def allowed(self) -> bytes:
        """A bit for each token of the vocabulary, lowest first: whether it may come next. The end
        of sequence may exactly where the answer is complete."""
        return self._matcher.compute_bitmask()

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def has_ended(self) -> bool:
        """The answer is complete and nothing can be added to it."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> InvalidRequest | None:
        """Why nothing can come next: the guide has outgrown its limits."""
        return _problem(self._matcher, self._guide) if self._matcher.is_error() else None

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._guide)


def forbidden_tokens(matchers: Sequence[Matcher], vocabulary: int) -> NDArray[np.bool_]:
    """(matchers, vocabulary): which tokens may not come next. All rows are unpacked at once: with
    small models what a step does in Python is most of a guide's cost.

    Args:
        vocabulary: the model's; its rows behind the tokenizer's stand for nothing.
    """
    masks = b"".join([matcher.allowed() for matcher in matchers])
    packed = np.frombuffer(masks, dtype=np.uint8).reshape(len(matchers), -1)
    return np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little") == 0


class GuideCompiler:
    """Guides -> matchers at their beginning. The latest guides are kept."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = sorted(eos_token_ids)
        self._cache: OrderedDict[Guide, Matcher] = OrderedDict()
        self._lock = threading.Lock()  # of the cache and of the vocabulary's first use

    def submit(self, guide: Guide, done: Callable[[], None]) -> Future[Matcher]:
        """Compiles in a thread of its own.

        Args:
            done: called there when the result, or the InvalidRequest, is in the future.
        """
        future = self._pool.submit(self.compile, guide)
        future.add_done_callback(lambda _: done())
        return future

    def compile(self, guide: Guide) -> Matcher:
        """
        Raises:
            InvalidRequest: the guide is wrong, cannot be fulfilled, or is too complex.
        """
        with self._lock:
            known = self._cache.get(guide)
            if known is not None:
                self._cache.move_to_end(guide)
                return known.copy()
            vocabulary = self._vocabulary
        matcher = Matcher(vocabulary.match(guide), guide)
        matcher.allowed()  # the first mask builds most of what was left for later
        if (error := matcher.error) is not None:
            raise error
        with self._lock:
            self._cache[guide] = matcher
            while len(self._cache) > CACHED_GUIDES:
                self._cache.popitem(last=False)
            return matcher.copy()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="guide")

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer, self._eos_token_ids)


class _Vocabulary:
    """The bytes of every token, as llguidance's trie of them."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        from llguidance import LLTokenizer

        table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        spaced = [i for i, text in enumerate(table) if text.startswith(b" ")]
        dropping = {i for i in spaced if not tokenizer.decode([i]).startswith(" ")}
        self._drops_space = bool(dropping)
        """Whether decoding drops a space at an answer's beginning (SentencePiece)."""
        if self._drops_space:
            # A byte-fallback space is kept where the others' is dropped; models never use it.
            for i in set(spaced) - dropping:
                table[i] = b""
        eos = [i for i in eos_token_ids if i < len(table)]
        for i in eos:
            table[i] = b""
        self._tokenizer: LLTokenizer = LLTokenizer(
            _TokenTable(table, eos),  # type: ignore[arg-type]
            eos_token=eos,
        )

    def match(self, guide: Guide) -> LLMatcher:
        """A matcher at its beginning.

        Raises:
            InvalidRequest: as in `GuideCompiler.compile`.
        """
        if not self._drops_space:
            return self._match(guide, "", "")
        # The space is written and not seen. It is left to the model where no answer can begin
        # with one of its own; where one can, it would otherwise be lost.
        if guide.kind == "regex":
            may_begin_with_space = self._match(guide, "", "").validate_tokens(self._space) > 0
        else:
            may_begin_with_space = guide.kind == "choice" and any(
                choice.startswith(" ") for choice in guide.choices()
            )
        return self._match(
            guide, '" "' if may_begin_with_space else '" "?', " " if may_begin_with_space else " ?"
        )

    @cached_property
    def _space(self) -> list[int]:
        return self._tokenizer.greedy_tokenize(" ")

    def _match(self, guide: Guide, lark_prefix: str, regex_prefix: str) -> LLMatcher:
        from llguidance import LLMatcher

        if guide.kind == "regex":
            pattern = f"{regex_prefix}(?:{guide.value})" if regex_prefix else guide.value
            grammar = LLMatcher.grammar_from_regex(pattern)
        elif guide.kind == "choice":
            choices = " | ".join(
                json.dumps(choice, ensure_ascii=False) for choice in guide.choices()
            )
            grammar = LLMatcher.grammar_from_lark(f"start: {lark_prefix} ({choices})")
        else:
            schema = json.loads(guide.value) if guide.kind == "json_schema" else {"type": "object"}
            schema["x-guidance"] = {"coerce_one_of": True, "whitespace_pattern": WHITESPACE}
            grammar = LLMatcher.grammar_from_lark(
                f"start: {lark_prefix} json\njson: %json {json.dumps(schema)}"
            )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise _problem(matcher, guide)
        return matcher


class _TokenTable:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token_ids: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else 0
        self.special_token_ids = [i for i, text in enumerate(tokens) if not text]
        self._by_bytes = {text: i for i, text in enumerate(tokens) if text}
        self._longest = max(map(len, tokens), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest tokens of the beginning of a text that the guide leaves no choice about."""
        rest = (text.encode() if isinstance(text, str) else text)[:LONGEST_FORCED]
        ids: list[int] = []
        while rest:
            for end in range(min(self._longest, len(rest)), 0, -1):
                token = self._by_bytes.get(rest[:end])
                if token is not None:
                    ids.append(token)
                    rest = rest[end:]
                    break
            else:
                return ids
        return ids


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    # The largest compile takes a quarter of a second with these, and a step some milliseconds.
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_items_in_row=1_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _problem(matcher: LLMatcher, guide: Guide) -> InvalidRequest:
    message = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if message.startswith("panic"):
        message = "it is too complex"
    return guide.problem(f"{guide.kind} cannot be followed: {message:.300}")
