"""Text comes in pieces that never have to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from models.engine.output_text import OutputText


class ByteTokenizer:
    """One token per UTF-8 byte, as with byte fallback."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces with a leading space each, which the first loses: SentencePiece's way."""

    words = ("\u2581the", "\u2581cat", "s", "\u2581", "\n")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = "".join(self.words[i] for i in ids).replace("\u2581", " ")
        return text.removeprefix(" ")


def feed(text: str, stop: Sequence[str] = ()) -> tuple[list[str], OutputText]:
    output = OutputText(ByteTokenizer(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(output.append(byte))
        if output.stopped:
            return pieces, output
    return [*pieces, output.finish()], output


def test_a_character_comes_whole_or_not_at_all() -> None:
    pieces, _ = feed("a猫b")
    assert pieces == ["a", "", "", "猫", "b", ""]


def test_an_unfinished_character_comes_at_the_end_as_a_replacement() -> None:
    output = OutputText(ByteTokenizer())
    assert [output.append(b) for b in "猫".encode()[:2]] == ["", ""]
    assert output.finish() == "\ufffd"


def test_broken_bytes_do_not_hold_the_stream_back_for_ever() -> None:
    output = OutputText(ByteTokenizer())
    text = "".join(output.append(0xFF) for _ in range(20)) + output.append(ord("x"))
    assert text.count("\ufffd") == 20 and text.endswith("x")


def test_spaces_between_pieces_survive() -> None:
    output = OutputText(WordTokenizer())
    assert [output.append(i) for i in (0, 1, 2, 4, 0)] == ["the", " cat", "s", "\n", " the"]


def test_the_text_ends_before_a_stop_string() -> None:
    pieces, output = feed("red###Human: and", ["###", "</s>"])
    assert "".join(pieces) == "red" and output.stopped
    assert output.finish() == ""


def test_what_only_began_like_a_stop_string_is_delivered() -> None:
    pieces, output = feed("a ## b #", ["###"])
    assert "".join(pieces) == "a ## b #" and not output.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    output = OutputText(WordTokenizer(), ["cats", " c"])
    assert output.append(0) == "the"
    assert output.append(1) == "" and output.stopped


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    stop = [s for s in (s.encode("utf-8", errors="ignore").decode() for s in stop) if s]
    pieces, output = feed(text, stop)
    got = "".join(pieces)
    ends = []
    for end in range(len(text) + 1):
        ends = [text[:end].index(s) for s in stop if s in text[:end]]
        if ends:
            break
    assert got == (text[: min(ends)] if ends else text)
    assert output.stopped == bool(ends)
