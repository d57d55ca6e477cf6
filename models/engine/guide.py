"""The form that an answer must have, as a request asks for it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, get_args

from models.errors import InvalidRequest

GuideKind = Literal["json_object", "json_schema", "regex", "choice"]

MAX_GUIDE_BYTES = 64 << 10
MAX_GUIDE_DEPTH = 64
"""Of a schema's objects and arrays, and of a pattern's groups."""
MAX_CHOICES = 1024
MAX_REPEATS = 2000
"""Of a pattern's "{n,m}", together; each is compiled as so many copies."""
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


@dataclass(frozen=True)
class Guide:
    """Every token of the answer is chosen among those that can still lead to such a text.

    What can be seen without compiling it is checked here; the rest when it is compiled, which also
    raises InvalidRequest.

    Attributes:
        kind: "json_object" (any object), "json_schema", "regex" (the whole answer matches) or
            "choice" (the answer is one of some strings).
        value: nothing, the schema as JSON, the pattern (Rust's syntax, without look-around and
            references), or the strings as a JSON list.
    """

    kind: GuideKind
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GuideKind):
            raise self.problem(f"the kind {self.kind!r:.80} is none of {get_args(GuideKind)}")
        if not isinstance(self.value, str):
            raise self.problem(f"{self.kind} is {type(self.value).__name__}; it must be a string")
        try:
            size = len(self.value.encode())
        except UnicodeEncodeError:
            raise self.problem("holds half of a surrogate pair, which is no character") from None
        if size > MAX_GUIDE_BYTES:
            raise self.problem(f"{self.kind} has {size} bytes; at most {MAX_GUIDE_BYTES}")
        if self.kind == "json_schema":
            self._check_schema()
        elif self.kind == "choice":
            self.choices()
        elif self.kind == "regex":
            self._check_depth(self.value, "(", ")")
            self._check_repeats()

    @property
    def field(self) -> str:
        """Where it stood in the request, for messages."""
        return "response_format" if self.kind in {"json_object", "json_schema"} else "guide"

    def problem(self, problem: str) -> InvalidRequest:
        return InvalidRequest(self.field, problem)

    def choices(self) -> list[str]:
        """The strings of a "choice"."""
        choices = self._parsed()
        if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
            raise self.problem("choice must be a list of strings, none of them empty")
        if not 0 < len(choices) <= MAX_CHOICES:
            raise self.problem(
                f"choice has {len(choices)} strings; it must have 1 to {MAX_CHOICES}"
            )
        return choices

    def _check_schema(self) -> None:
        self._check_depth(self.value, "[{", "]}")
        self._check_repeats()  # of the patterns in it; no other JSON looks like one
        if not isinstance(self._parsed(), dict):
            raise self.problem("the schema must be a JSON object")

    def _parsed(self) -> object:
        try:
            return json.loads(self.value)
        except (ValueError, RecursionError):
            raise self.problem(f"{self.kind} is not valid JSON") from None

    def _check_repeats(self) -> None:
        bounds = (match.groups(default="") for match in _REPEAT.finditer(self.value))
        # Longer numbers than any limit are cut, since Python refuses to read the longest.
        total = sum(max(int(low[:9]), int(high[:9] or 0)) for low, high in bounds)
        if total > MAX_REPEATS:
            raise self.problem(f"{self.kind} repeats up to {total} times; at most {MAX_REPEATS}")

    def _check_depth(self, text: str, opening: str, closing: str) -> None:
        """Brackets inside strings count, too: it is a bound, not a parser."""
        depth = deepest = 0
        for character in text:
            if character in opening:
                depth += 1
                deepest = max(deepest, depth)
            elif character in closing:
                depth -= 1
        if deepest > MAX_GUIDE_DEPTH:
            raise self.problem(f"{self.kind} is nested {deepest} deep; at most {MAX_GUIDE_DEPTH}")
