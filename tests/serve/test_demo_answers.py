"""The demo model behind the real worker: true answers about real pictures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.client import WorkerError, ask, main
from models.demo import SceneObject, draw, draw_number, simple_scene
from tests.serve.worker import Worker, base64_of

PAIRS = [
    (colour, shape)
    for colour, shape in zip(
        ["red", "orange", "yellow", "green", "blue", "purple", "black", "red"] * 2,
        ["circle", "square", "triangle", "star", "cross", "ring"] * 3,
        strict=False,
    )
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


def test_the_readmes_example_answers_truly(demo: Worker) -> None:
    for _ in range(5):  # it samples, and must be right every time
        record = demo.last(
            model="llava-demo-4bit-AWQ",
            prompt="USER: What is in this image?\n<image> ASSISTANT:",
            images=[base64_of(simple_scene("red", "circle"))],
            temperature=0.2, top_p=1.0, max_new_tokens=512,
        )  # fmt: skip
        assert record["text"].endswith("ASSISTANT:The image shows a red circle.")
        assert record["finish_reason"] == "stop"


def test_sixteen_clients_at_once_each_get_the_answer_to_their_own(demo: Worker) -> None:
    assert len(set(PAIRS)) >= 14

    def client(index: int) -> tuple[str, str]:
        colour, shape = PAIRS[index]
        picture = simple_scene(colour, shape)
        if index % 3 == 0:
            return demo.ask(
                picture, "What is in this image?"
            ), f"The image shows {an(colour)} {shape}."
        if index % 3 == 1:
            return demo.ask(picture, f"What colour is the {shape}?"), f"It is {colour}."
        return demo.ask(picture, f"What shape is the {colour} object?"), f"It is {an(shape)}."

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client, range(16)))
    assert [given for given, _ in answers] == [true for _, true in answers]
    demo.wait_until_empty()


def an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def test_two_pictures_that_differ_only_in_their_order_of_sides_are_told_apart(demo: Worker) -> None:
    circle, star = SceneObject("circle", "red", x=0.25), SceneObject("star", "blue", x=0.75)
    mirrored = (SceneObject("circle", "red", x=0.75), SceneObject("star", "blue", x=0.25))
    question = "Is the circle to the left or to the right of the star?"
    assert demo.ask(draw([circle, star]), question) == "It is to the left."
    assert demo.ask(draw(mirrored), question) == "It is to the right."


@pytest.mark.parametrize("system", ["", SYSTEM, "You are a helpful assistant. "])
@pytest.mark.parametrize("form", ["<image>\n{q}", "{q}\n<image>"])
def test_whatever_stands_around_the_question(demo: Worker, system: str, form: str) -> None:
    prompt = f"{system}USER: {form.format(q='How many objects are there?')} ASSISTANT:"
    picture = draw([SceneObject("ring", "green", x=0.25), SceneObject("square", "black", x=0.75)])
    record = demo.last(prompt=prompt, images=[base64_of(picture)], temperature=0)
    assert record["text"] == f"{prompt}There are two."


def test_a_conversation_goes_on_and_its_beginning_is_not_computed_again(demo: Worker) -> None:
    picture = base64_of(draw_number("42", size=(200, 100)))
    first = f"{SYSTEM}USER: <image>\nWhat number is written here? ASSISTANT:"
    answer = demo.last(prompt=first, images=[picture], temperature=0)["text"]
    assert answer == f"{first}The number is 42."
    before = demo.stats()["prefix_hit_tokens"]
    second = f"{answer}</s>USER: Is there a circle? ASSISTANT:"
    record = demo.last(prompt=second, images=[picture], temperature=0)
    assert record["text"] == f"{second}No, there is not."
    assert demo.stats()["prefix_hit_tokens"] - before >= 64


def test_the_client_prints_the_answer(
    demo: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.jpg"
    simple_scene("blue", "star").save(file, quality=90)
    assert main([str(file), "What is in this image?", "--url", demo.url]) == 0
    assert capsys.readouterr().out == "The image shows a blue star.\n"


def test_the_client_says_what_is_wrong(
    demo: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"no picture")
    assert main([str(file), "What?", "--url", demo.url]) == 1
    assert str(file) in capsys.readouterr().err
    with pytest.raises(WorkerError, match="nothing answers at"):
        list(ask("http://127.0.0.1:9", "Hi"))
