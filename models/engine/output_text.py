"""Tokens -> text, a piece at a time, such that no piece ever has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
LONGEST_UTF8 = 4


class Decodes(Protocol):
    """The one thing needed of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class OutputText:
    """The text of one answer as it grows.

    Held back are bytes that do not yet make a character, and a tail that may become a stop
    string. When a stop string is found the text ends before it and `stopped` is True.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        """
        Args:
            min_tokens: a stop string that is complete within so many tokens is none.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._ids: list[int] = []
        # ids:  [ ..released.. | context | pending ]
        #                      ^ _context ^ _read
        # A piece's text depends on the pieces before it (SentencePiece drops a leading space),
        # so pending ids are decoded together with the last ones that have been read.
        self._context = 0
        self._read = 0
        self._released = ""
        """How much of the text from `_context` on has been released."""
        self._held = ""
        self.stop_reason: str | None = None
        """The stop string that was found."""

    @property
    def stopped(self) -> bool:
        return self.stop_reason is not None

    def append(self, token_id: int) -> str:
        """Text that is new and final after this token; often "", while something is held back."""
        self._num_tokens += 1
        self._ids.append(token_id)
        text = self._decode(self._context, len(self._ids))
        whole = text.rstrip(REPLACEMENT)
        if len(whole) == len(text):
            return self._hold_back(self._advance(len(self._ids), text))
        if len(whole) > len(self._released):  # this token ends one character and begins another
            new, self._released = whole[len(self._released) :], whole
            self._read = len(self._ids) - 1
            return self._hold_back(new)
        if self._is_skipped(token_id):
            self._ids.pop()  # a character's bytes may go on behind it
        if len(self._ids) - self._read < LONGEST_UTF8:
            return ""
        # Three tokens later the oldest is still no character: it never will be, but they may.
        end = self._read + 1
        return self._hold_back(self._advance(end, self._decode(self._context, end)))

    def finish(self) -> str:
        """The rest, when no more tokens come: what was held back in the hope of more."""
        if self.stopped:
            return ""
        end = len(self._ids)
        text = self._hold_back(self._advance(end, self._decode(self._context, end)))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _advance(self, end: int, text: str) -> str:
        """The new text of ids up to `end`, which are then read.

        Args:
            text: of the ids from `_context` to `end`.
        """
        new = text[len(self._released) :]
        self._released = text
        own = self._decode(self._read, end)
        if own:  # tokens without a text of their own would be no context for the next ones
            self._context, self._released = self._read, own
        self._read = end
        return new

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end])

    def _is_skipped(self, token_id: int) -> bool:
        """Whether it is a special token, which no text shows."""
        alone = [token_id]
        return self._tokenizer.decode(alone) != self._tokenizer.decode(
            alone, skip_special_tokens=False
        )

    def _hold_back(self, new: str) -> str:
        text = self._held + new
        if self._num_tokens > self._min_tokens:
            # Each must end in what is new: what is held back may hold one that came too early.
            held = len(self._held)
            found = [
                (index, stop)
                for stop in self._stop
                if (index := text.find(stop, max(0, held + 1 - len(stop)))) >= 0
            ]
            if found:
                index, self.stop_reason = min(found)
                self._held = ""
                return text[:index]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
