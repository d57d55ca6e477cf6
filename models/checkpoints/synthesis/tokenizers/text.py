"""What the tokenizers are trained on, and the words that fill their vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product

TEXT = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives
helpful, detailed, and polite answers to the user's questions. USER: What is shown in this image?
ASSISTANT: The image shows a red square to the left of a blue circle. How many objects are there?
There are three: one green triangle, one yellow star and one large orange ring. Describe the
picture in detail. Where is the small black cross? It is at the top right. Which number is written
here? The number is 42. Is there a dog in the photograph? No, there is no dog; a cat sleeps on the
sofa, next to a window through which you can see the street, the trees and a few parked cars.
Thank you! You are welcome. Could you explain why the sky is blue? Sunlight is scattered by the
air, and short wavelengths are scattered more than long ones. Write a short poem about the sea.
The sea is wide, the sea is deep, it sings the sailors all to sleep. Translate "good morning".
"""

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def lines() -> list[str]:
    return TEXT.strip().split("\n")


def filler_words() -> Iterator[str]:
    """Made-up words without end, no two alike: a full-sized vocabulary needs more tokens than a
    short text yields."""
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    for length in count(3):
        yield from map("".join, product(syllables, repeat=length))
