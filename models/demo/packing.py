"""A picture and several dialogues about it -> one training row.

A row is a forest. A tree's root is what its dialogues share (system prompt and picture); each
branch is one dialogue's rest, and sees the root and itself only, at the positions that it would
have if it stood alone. So a picture is paid for once and asked about several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.demo import questions as subject
from models.demo.dialogue import IMAGE, Dialogue, compose, message, opening, random_system
from models.demo.questions import (
    LAST_WEIGHTS,
    Balance,
    Question,
    contrasting,
    questions_about,
)
from models.demo.roles import patch_roles, word_roles
from models.demo.sampling import random_scene
from models.demo.scenes import Scene
from models.demo.tokenizer import BEGIN, END

ROW_LENGTH = 160
PICTURE_TOKENS = 36
NO_TARGET = -100
PICTURE = -200
"""Stands for a picture's place among token ids, once for all its tokens."""


@dataclass
class Branch:
    """Tokens of one dialogue's part, and which of them are to be learned.

    Attributes:
        roles: of the tokens, NO_TARGET where they are not to be told; see `roles.py`.
        patch_roles: of the picture's tokens.
    """

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    patch_roles: Sequence[int] = (NO_TARGET,) * PICTURE_TOKENS

    def read(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.roles += [NO_TARGET] * len(ids)
        self.learned += [False] * len(ids)

    def learn(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.learned += [True] * len(ids)
        self.roles += [NO_TARGET] * len(ids)

    def __len__(self) -> int:
        return sum(PICTURE_TOKENS if token == PICTURE else 1 for token in self.ids)


@dataclass
class Tree:
    root: Branch
    branches: list[Branch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.root) + sum(map(len, self.branches))


class Encoder:
    """Texts -> ids, exactly as `models.prompts.tokenize_prompt` cuts and encodes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        @lru_cache(maxsize=50_000)
        def encode(text: str) -> tuple[Sequence[int], Sequence[int]]:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            return tuple(encoding.ids), tuple(end for _, end in encoding.offsets)

        self._encode = encode

    def text(self, text: str) -> Sequence[int]:
        ids, _ = self._encode(text)
        return ids

    def roles(self, text: str, question: Question) -> list[int]:
        """Of each token of `text`, which holds the question."""
        _, ends = self._encode(text)
        return word_roles(question, text, ends)

    def prompt(self, text: str) -> list[int]:
        """With the beginning-of-sequence token, and PICTURE for the placeholder."""
        ids = [BEGIN]
        for index, piece in enumerate(text.split(IMAGE)):
            ids += [*([PICTURE] if index else []), *self.text(piece)]
        return ids

    def answer(self, text: str) -> list[int]:
        return [*self.text(text), END]

    def dialogue(self, dialogue: Dialogue) -> Branch:
        """All turns; the answers are to be learned."""
        branch = Branch()
        branch.read(self.prompt(dialogue.prompt))
        self._turns(branch, dialogue.answers, dialogue.later)
        return branch

    def rest(self, prompt: str, asked: Sequence[Question]) -> Branch:
        """A branch: the first turn's `prompt` behind the root, then all turns of `asked`."""
        branch = Branch()
        branch.read(self.text(prompt))
        later = [f"USER: {question.text} ASSISTANT:" for question in asked[1:]]
        self._turns(branch, [question.answer for question in asked], later)
        return branch

    def _turns(self, branch: Branch, answers: Sequence[str], later: Sequence[str]) -> None:
        branch.learn(self.answer(answers[0]))
        for prompt, answer in zip(later, answers[1:], strict=True):
            branch.read(self.text(prompt))
            branch.learn(self.answer(answer))


@dataclass(frozen=True)
class Row:
    """Arrays of one entry a token.

    Attributes:
        ids: token ids; 0 where there is a picture or nothing.
        picture: which of the picture's tokens stands there, or -1.
        position: for the rotary embedding.
        tree, branch: who sees whom; branch 0 is a root. Tree -1 is the empty rest of the row.
        target: the id to predict there, or NO_TARGET.
        role: of a word or patch in its question, or NO_TARGET.
    """

    ids: NDArray[np.int64]
    picture: NDArray[np.int64]
    position: NDArray[np.int64]
    tree: NDArray[np.int64]
    branch: NDArray[np.int64]
    target: NDArray[np.int64]
    role: NDArray[np.int64]


class RowMaker:
    """Rows about given scenes; what is asked is balanced over all rows that it has made."""

    def __init__(
        self, tokenizer: Tokenizer, rng: Random, last_share: float, last_sides: float
    ) -> None:
        """
        Args:
            last_share: of the rows whose questions come before the picture.
            last_sides: the weight of questions about sides among those.
        """
        self._last_share = last_share
        self._encoder = Encoder(tokenizer)
        self._rng = rng
        self._first_balance = Balance()
        self._last_balance = Balance({**LAST_WEIGHTS, "side": last_sides})

    def row(self, scene: Scene) -> Row:
        rng = self._rng
        about = questions_about(scene, rng)
        trees: list[Tree] = []
        if rng.random() >= self._last_share:
            trees.append(self._picture_first(about, turns_share=0.2))
        else:
            first = self._pick(about, self._last_balance)
            second = self._pick(contrasting(first, about) or about, self._last_balance)
            trees += [self._picture_last(one, about, scene) for one in (first, second)]
        while _length(trees) > ROW_LENGTH:
            trees.pop()
        if not trees:  # an uncommonly long system prompt and question
            return self.row(scene)
        self._fill_with_talk(trees)
        return lay_out(trees)

    def _pick(self, about: Sequence[Question], balance: Balance) -> Question:
        if self._rng.random() < 0.05:
            return (subject.off_subject if self._rng.random() < 0.75 else subject.chat)(self._rng)
        return balance.pick(self._rng, about)

    def _picture_first(self, about: list[Question], turns_share: float) -> Tree:
        """As many questions as have room, each by itself or several in turn."""
        root = Branch()
        root.read(self._encoder.prompt(f"{opening(random_system(self._rng))}{IMAGE}"))
        tree = Tree(root)
        for _ in range(8):
            turns = self._rng.choice((2, 3)) if self._rng.random() < turns_share else 1
            asked = [self._pick(about, self._first_balance) for _ in range(turns)]
            start = message(asked[0].text, "before", self._rng).removeprefix(IMAGE)
            branch = self._encoder.rest(f"{start} ASSISTANT:", asked)
            if len(tree) + len(branch) > ROW_LENGTH:
                break
            tree.branches.append(branch)
        return tree

    def _picture_last(self, question: Question, about: list[Question], scene: Scene) -> Tree:
        asked = [question]
        if self._rng.random() < 0.2:
            asked.append(self._pick(about, self._last_balance))
        dialogue = compose(asked, random_system(self._rng), "after", self._rng)
        branch = self._encoder.dialogue(dialogue)
        if question.mentions:
            before, _ = dialogue.prompt.split(IMAGE)
            roles = self._encoder.roles(before, question)
            branch.roles[1 : 1 + len(roles)] = roles  # behind the beginning-of-sequence token
            branch.patch_roles = patch_roles(question, scene)
        return Tree(branch)

    def _fill_with_talk(self, trees: list[Tree]) -> None:
        """Dialogues without a picture, where there is room for one."""
        rng = self._rng
        for _ in range(2):
            room = ROW_LENGTH - _length(trees)
            if room < 30:
                return
            system = random_system(rng)
            asked = [self._talk() for _ in range(2 if rng.random() < 0.25 else 1)]
            tree = Tree(self._encoder.dialogue(compose(asked, system, "none", rng)))
            if len(tree) <= room:
                trees.append(tree)

    def _talk(self) -> Question:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            return subject.without_picture(rng.choice(questions_about(random_scene(rng), rng)))
        return subject.off_subject(rng) if kind < 0.85 else subject.chat(rng)


def _length(trees: Sequence[Tree]) -> int:
    return sum(map(len, trees))


def lay_out(trees: Sequence[Tree], length: int = ROW_LENGTH) -> Row:
    """
    Raises:
        ValueError: they do not fit into one row.
    """
    total = _length(trees)
    if total > length:
        raise ValueError(f"{total} tokens do not fit into a row of {length}")
    row = Row(*(np.zeros(length, dtype=np.int64) for _ in range(7)))
    row.picture[:] = -1
    row.tree[:] = -1
    row.target[:] = row.role[:] = NO_TARGET
    at = 0
    for number, tree in enumerate(trees):
        for index, branch in enumerate([tree.root, *tree.branches]):
            ids, picture, target, role = _expand(branch)
            span = slice(at, at + len(ids))
            start = 0 if index == 0 else len(tree.root)
            row.ids[span], row.picture[span], row.target[span] = ids, picture, target
            row.role[span] = role
            row.position[span] = np.arange(start, start + len(ids))
            row.tree[span], row.branch[span] = number, index
            at += len(ids)
    return row


def _expand(branch: Branch) -> tuple[list[int], list[int], list[int], list[int]]:
    """(ids, picture tokens, targets, roles); a target stands one place before its token."""
    ids: list[int] = []
    picture: list[int] = []
    learned: list[bool] = []
    roles: list[int] = []
    for token, is_learned, role in zip(branch.ids, branch.learned, branch.roles, strict=True):
        width = PICTURE_TOKENS if token == PICTURE else 1
        ids += [0 if token == PICTURE else token] * width
        picture += range(PICTURE_TOKENS) if token == PICTURE else [-1]
        learned += [is_learned] * width
        roles += branch.patch_roles if token == PICTURE else [role]
    target = [
        token if is_learned else NO_TARGET
        for token, is_learned in zip(ids[1:], learned[1:], strict=True)
    ]
    return ids, picture, [*target, NO_TARGET], roles
