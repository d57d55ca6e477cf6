"""What can be asked of a scene, and the true answers.

Questions are balanced by their answers, not only by their kinds: an answer that never occurs in
training ("three" circles) is never given, and an average over a kind hides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from random import Random

from models.demo import phrasings
from models.demo.phrasings import phrase
from models.demo.sampling import ORDER_GAP, TOWER_SIDE, tower_point
from models.demo.scenes import COLOURS, SHAPES, Scene, SceneObject

CELL_MARGIN = 0.05
"""How far from the lines between thirds an object must be for "where" to be plain."""
SIDE_GAP = 22.0
"""Pixels of the tower's square by which one object must lie beside or above another."""
COUNTS = ("There are none.", "There is one.", "There are two.", "There are three.")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
OPPOSITES = (("It is above.", "It is below."), ("It is to the left.", "It is to the right."))
YES, NO = "Yes, there is.", "No, there is not."
EMPTY = "The image is empty."
NO_PICTURE = "Please send a picture first."
OFF_SUBJECT = "I can only answer questions about pictures of shapes and numbers."
GREETING = "Hello! Send me a picture of shapes or of a number."
WELCOME = "You are welcome."
IDENTITY = "I am a small demo model. I can see shapes, colours and numbers in pictures."

KIND_WEIGHTS: Mapping[str, float] = {
    "colour": 1.0, "shape": 1.0, "where": 2.0, "side": 2.6, "exists": 0.9, "count": 0.8,
    "count_of": 1.6, "describe_1": 0.7, "describe_2": 1.0, "describe_3": 1.6, "empty": 0.2,
    "number": 1.2, "describe_number": 0.7, "absent": 0.9,
}  # fmt: skip
"""How often each kind is asked of a picture, relative to the others."""
LAST_WEIGHTS: Mapping[str, float] = {
    "colour": 1.0, "shape": 1.2, "where": 2.4, "side": 4.0, "exists": 1.2, "count": 0.4,
    "count_of": 3.0, "describe_1": 0.2, "describe_2": 0.3, "describe_3": 0.4, "empty": 0.1,
    "number": 0.6, "describe_number": 0.2, "absent": 1.8,
}  # fmt: skip
"""The same, where the picture comes after its question: most for what is learned last there."""


@dataclass(frozen=True)
class Mention:
    """
    Attributes:
        noun: as it stands in the question, but for capitals.
        objects: indices of the scene's objects that it means; there may be none.
    """

    noun: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        kind: what is reported on together.
        stratum: what is balanced: the answer, where a kind has few of them.
        text: as a person would ask.
        answer: the only one that counts.
        mentions: what is asked about, then what that is compared with; none where the question
            is about the whole picture.
    """

    kind: str
    stratum: str
    text: str
    answer: str
    mentions: tuple[Mention, ...] = ()


class Balance:
    """Draws among candidates so that kinds come by their weights, and a kind's strata alike."""

    def __init__(self, weights: Mapping[str, float] = KIND_WEIGHTS) -> None:
        self._weights = weights
        self._kinds: Counter[str] = Counter()
        self._strata: Counter[tuple[str, str]] = Counter()

    def pick(self, rng: Random, candidates: Sequence[Question]) -> Question:
        kinds = sorted({question.kind for question in candidates})
        total = 20 + self._kinds.total()
        # Squared, because few pictures allow some kinds at all, and the same holds for strata.
        need = [(self._weights[kind] / (self._kinds[kind] + 0.002 * total)) ** 2 for kind in kinds]
        kind = rng.choices(kinds, need)[0]
        of_kind = [question for question in candidates if question.kind == kind]
        rarity = [(self._strata[kind, question.stratum] + 3) ** -2 for question in of_kind]
        chosen = rng.choices(of_kind, rarity)[0]
        self._kinds[kind] += 1
        self._strata[kind, chosen.stratum] += 1
        return chosen


def questions_about(scene: Scene, rng: Random) -> list[Question]:
    """At least one question of every kind and answer that this scene allows."""
    found = [*_describe(scene, rng), *_exists(scene, rng), *_absent(scene, rng)]
    if scene.number is not None:
        number = scene.number
        digits = "two digits" if len(number.text) > 1 else number.text
        found.append(Question(
            "number", digits, phrase(rng, phrasings.NUMBER), f"The number is {number.text}."
        ))  # fmt: skip
        word = rng.choice(("number", "digit" if len(number.text) == 1 else "number"))
        text = phrase(rng, phrasings.COLOUR, it=f"the {word}")
        answer = f"It is {number.colour}."
        found.append(Question("colour", answer, text, answer))
        return found
    found += [*_counts(scene, rng), *_attributes(scene, rng), *_sides(scene, rng)]
    return found


def contrasting(question: Question, about: Sequence[Question]) -> list[Question]:
    """Those of the same kind with the opposite answer, or else with another one. Whoever has to
    answer both about one picture cannot go by the picture or by the words alone."""
    alike = [other for other in about if other.kind == question.kind]
    opposite = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}.get(question.answer)
    opposed = [other for other in alike if other.answer == opposite]
    return opposed or [other for other in alike if other.answer != question.answer]


def chat(rng: Random) -> Question:
    """Talk that needs no picture."""
    forms, answer = rng.choice((
        (phrasings.GREETINGS, GREETING), (phrasings.THANKS, WELCOME),
        (phrasings.IDENTITY, IDENTITY),
    ))  # fmt: skip
    return Question("chat", answer, phrase(rng, forms), answer)


def off_subject(rng: Random) -> Question:
    return Question("off_subject", OFF_SUBJECT, phrasings.off_subject(rng), OFF_SUBJECT)


def without_picture(question: Question) -> Question:
    """The same question where no picture was sent."""
    return Question("no_picture", NO_PICTURE, question.text, NO_PICTURE)


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def enumeration(nouns: Sequence[str]) -> str:
    """ "a red circle, a blue star and an orange ring"."""
    named = [with_article(noun) for noun in nouns]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def place_of(scene: Scene, item: SceneObject) -> str | None:
    """The ninth of the picture that holds its centre; None if that is close to another."""
    x, y = tower_point(scene, item.x, item.y)
    left, top = tower_point(scene, 0, 0)
    for position, start in ((x, left), (y, top)):
        extent = TOWER_SIDE - 2 * start
        for line in (start + extent / 3, start + 2 * extent / 3):
            if abs(position - line) < max(CELL_MARGIN * extent, 2.5):
                return None
    return PLACES[min(2, int(3 * item.y))][min(2, int(3 * item.x))]


def left_to_right(scene: Scene) -> list[SceneObject] | None:
    """The objects in order; None if that is not plain."""
    ordered = sorted(scene.objects, key=lambda item: item.x)
    at = [tower_point(scene, item.x, item.y)[0] for item in ordered]
    if any(right - left < ORDER_GAP - 0.01 for left, right in pairwise(at)):
        return None
    return ordered


def _name(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _describe(scene: Scene, rng: Random) -> Iterable[Question]:
    text = phrase(rng, phrasings.DESCRIBE)
    if scene.number is not None:
        answer = f"The image shows the number {scene.number.text}."
        yield Question("describe_number", "number", text, answer)
    elif not scene.objects:
        yield Question("empty", EMPTY, text, EMPTY)
    else:
        ordered = left_to_right(scene)
        if ordered is not None:
            names = enumeration([_name(item) for item in ordered])
            kind = f"describe_{len(ordered)}"
            yield Question(kind, kind, text, f"The image shows {names}.")


def _exists(scene: Scene, rng: Random) -> Iterable[Question]:
    """Half of the nos are close to what is there: the right colour, or the right shape."""

    def ask(noun: str, answer: str) -> Question:
        text = phrase(rng, phrasings.EXISTS, a=noun)
        mentions = (_mention(scene, noun),) if scene.number is None else ()
        return Question("exists", answer, text, answer, mentions)

    if scene.number is not None:
        noun = rng.choice(("a number", f"a {scene.number.colour} number"))
        yield ask(noun.replace("a orange", "an orange"), YES)
        yield ask(with_article(f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"), NO)
        yield ask(with_article(rng.choice(SHAPES)), NO)
        yield ask(rng.choice(phrasings.OTHER_THINGS), NO)
        return
    shapes = {item.shape for item in scene.objects}
    colours = {item.colour for item in scene.objects}
    names = {_name(item) for item in scene.objects}
    other_shapes = [shape for shape in SHAPES if shape not in shapes]
    other_colours = [colour for colour in COLOURS if colour not in colours]
    yield ask(with_article(rng.choice(other_shapes)), NO)
    yield ask(_object_of(rng, rng.choice(other_colours)), NO)
    yield ask(rng.choice(("a number", rng.choice(phrasings.OTHER_THINGS))), NO)
    if scene.objects:
        item = rng.choice(scene.objects)
        yield ask(with_article(item.shape), YES)
        yield ask(_object_of(rng, item.colour), YES)
        yield ask(with_article(_name(item)), YES)
        near = [
            f"{colour} {shape}"
            for colour, shape in (
                (item.colour, rng.choice(SHAPES)), (rng.choice(list(COLOURS)), item.shape),
                (rng.choice(scene.objects).colour, rng.choice(scene.objects).shape),
            )
        ]  # fmt: skip
        yield from (ask(with_article(name), NO) for name in near if name not in names)


def _mention(scene: Scene, noun: str) -> Mention:
    """ "a red object", "circles", "blue shapes": all objects of the named colour and shape."""
    words = noun.replace("crosses", "cross").split()
    singular = {f"{shape}s": shape for shape in SHAPES}
    wanted = [word for word in (singular.get(word, word) for word in words) if _is_attribute(word)]
    meant = (
        index
        for index, item in enumerate(scene.objects)
        if wanted and all(word in (item.colour, item.shape) for word in wanted)
    )
    return Mention(noun, tuple(meant))


def _is_attribute(word: str) -> bool:
    return word in COLOURS or word in SHAPES


def _object_of(rng: Random, colour: str) -> str:
    return with_article(f"{colour} {rng.choice(('object', 'object', 'shape', 'thing'))}")


def _absent(scene: Scene, rng: Random) -> Iterable[Question]:
    """Questions that suppose something which is not there."""

    def ask(noun: str, stratum: str, forms: Sequence[str]) -> Question:
        text = phrase(rng, forms, it=f"the {noun}")
        mention = Mention(f"the {noun}", ())
        return Question("absent", stratum, text, f"There is no {noun}.", (mention,))

    shapes = {item.shape for item in scene.objects}
    colours = {item.colour for item in scene.objects}
    shape = rng.choice([shape for shape in SHAPES if shape not in shapes])
    colour = rng.choice([colour for colour in COLOURS if colour not in colours])
    yield ask(shape, f"There is no {shape}.", rng.choice((phrasings.COLOUR, phrasings.WHERE)))
    yield ask(
        f"{colour} object",
        f"There is no {colour} object.",
        rng.choice((phrasings.SHAPE, phrasings.WHERE)),
    )
    near = rng.choice([*sorted(shapes), shape])
    yield ask(f"{colour} {near}", "a pair", phrasings.WHERE)
    if scene.number is None:
        text = phrase(rng, phrasings.NUMBER[:9])
        yield Question("absent", "There is no number.", text, "There is no number.")


def _counts(scene: Scene, rng: Random) -> Iterable[Question]:
    answer = COUNTS[len(scene.objects)]
    yield Question("count", answer, phrase(rng, phrasings.COUNT), answer)
    shapes = Counter(item.shape for item in scene.objects)
    colours = Counter(item.colour for item in scene.objects)
    nouns = {f"{'crosse' if shape == 'cross' else shape}s": shapes[shape] for shape in SHAPES}
    thing = rng.choice(("objects", "shapes", "things"))
    nouns |= {f"{colour} {thing}": colours[colour] for colour in COLOURS}
    zeros = [noun for noun, count in nouns.items() if count == 0]
    for noun in [*(noun for noun in nouns if nouns[noun] > 0), *rng.sample(zeros, 2)]:
        answer = COUNTS[nouns[noun]]
        text = phrase(rng, phrasings.COUNT_OF, them=noun)
        yield Question("count_of", answer, text, answer, (_mention(scene, noun),))


def _attributes(scene: Scene, rng: Random) -> Iterable[Question]:
    for index, item in enumerate(scene.objects):
        by_shape, by_colour, by_both = _references(scene, item)
        if by_shape:
            answer = f"It is {item.colour}."
            text = phrase(rng, phrasings.COLOUR, it=by_shape)
            yield Question("colour", answer, text, answer, (Mention(by_shape, (index,)),))
        if by_colour:
            noun = by_colour.replace("object", rng.choice(("object", "object", "thing", "one")))
            answer = f"It is {with_article(item.shape)}."
            text = phrase(rng, phrasings.SHAPE, it=noun)
            yield Question("shape", answer, text, answer, (Mention(noun, (index,)),))
        names = [name for name in (by_shape, by_colour, by_both) if name]
        place = place_of(scene, item)
        if names and place is not None:
            answer = f"It is {place}."
            name = rng.choice(names)
            text = phrase(rng, phrasings.WHERE, it=name)
            yield Question("where", answer, text, answer, (Mention(name, (index,)),))
    if len(scene.objects) == 1:
        item = scene.objects[0]
        it = rng.choice(("the object", "the shape", "it"))
        colour, shape = f"It is {item.colour}.", f"It is {with_article(item.shape)}."
        yield Question("colour", colour, phrase(rng, phrasings.COLOUR[:9], it=it), colour)
        text = phrase(rng, ("What shape is {it}?", "Which shape is {it}?"), it=it)
        yield Question("shape", shape, text, shape)


def _references(scene: Scene, item: SceneObject) -> tuple[str | None, str | None, str | None]:
    """By its shape, its colour and both, as far as each means this object only."""
    others = [other for other in scene.objects if other is not item]
    by_shape = all(other.shape != item.shape for other in others)
    by_colour = all(other.colour != item.colour for other in others)
    by_both = all(_name(other) != _name(item) for other in others)
    return (
        f"the {item.shape}" if by_shape else None,
        f"the {item.colour} object" if by_colour else None,
        f"the {_name(item)}" if by_both else None,
    )


def _sides(scene: Scene, rng: Random) -> Iterable[Question]:
    for pair in combinations(range(len(scene.objects)), 2):
        for indices in permutations(pair):
            item, other = (scene.objects[index] for index in indices)
            its = [name for name in _references(scene, item) if name]
            others = [name for name in _references(scene, other) if name]
            if not its or not others:
                continue
            slots = {"it": rng.choice(its), "other": rng.choice(others)}
            mentions = tuple(
                Mention(noun, (index,)) for noun, index in zip(slots.values(), indices, strict=True)
            )
            x, y = tower_point(scene, item.x, item.y)
            other_x, other_y = tower_point(scene, other.x, other.y)
            if abs(x - other_x) >= SIDE_GAP:
                answer = f"It is to the {'left' if x < other_x else 'right'}."
                text = phrase(rng, phrasings.SIDEWAYS, **slots)
                yield Question("side", answer, text, answer, mentions)
            if abs(y - other_y) >= SIDE_GAP:
                answer = f"It is {'above' if y < other_y else 'below'}."
                text = phrase(rng, phrasings.UPDOWN, **slots)
                yield Question("side", answer, text, answer, mentions)
