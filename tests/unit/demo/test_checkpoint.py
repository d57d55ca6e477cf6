"""The stored checkpoint: small, whole, and right about pictures that it has not seen."""

from __future__ import annotations

import io
import json
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models import SamplingParams, load_engine
from models.demo import DEMO_CHECKPOINT, SceneObject, draw, draw_number, simple_scene
from models.demo.dialogue import LLAVA_V1, VICUNA_V1
from models.demo.evaluate import missed_gates
from models.demo.export import export_checkpoint
from models.demo.held_out import held_out
from models.demo.network import NetworkConfig
from models.demo.teacher import answer_losses, load_network

LARGEST = 12_000_000
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)


@pytest.fixture(scope="module", params=["W4A16", "W16A16"])
def engine(request):
    with load_engine(DEMO_CHECKPOINT, precision=request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sample():
    """Held-out questions, a few of every kind."""
    kinds: Counter[str] = Counter()
    chosen = []
    for item in held_out(600, seed="test"):
        kinds[item.question.kind] += 1
        if kinds[item.question.kind] <= 8:
            chosen.append(item)
    return chosen


def _tokenizer():
    return Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))


def _ask(engine, question, image, system=VICUNA_V1, params=GREEDY):
    prompt = f"{system} USER: {question} ASSISTANT:".strip()
    images = [] if image is None else [image]
    return "".join(delta.text for delta in engine.generate(prompt, images, params)).strip()


def test_it_is_small():
    files = [path for path in DEMO_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST


def test_its_files_are_those_that_export_writes(tmp_path):
    network = load_network(DEMO_CHECKPOINT, "W16A16")
    export_checkpoint(network, _tokenizer(), tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    stored = {p.relative_to(DEMO_CHECKPOINT) for p in DEMO_CHECKPOINT.rglob("*") if p.is_file()}
    assert {str(path) for path in stored - written} <= {"README.md", "evaluation.json"}
    assert written <= stored
    for path in written:
        if path.suffix == ".json":
            assert (tmp_path / path).read_text() == (DEMO_CHECKPOINT / path).read_text()
        elif path.suffix == ".safetensors":
            ours, theirs = load_file(tmp_path / path), load_file(DEMO_CHECKPOINT / path)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs | ours)
    (packed,) = tmp_path.glob("*-w4-g128-awq-v2.pt")
    ours, theirs = (torch.load(folder / packed.name) for folder in (tmp_path, DEMO_CHECKPOINT))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs | ours)


def test_its_widths_suit_four_bits():
    config = NetworkConfig()
    assert config.hidden % 128 == config.intermediate % 128 == 0


def test_the_recorded_evaluation_is_good_overall_and_the_card_admits_every_gate_it_misses():
    record = json.loads((DEMO_CHECKPOINT / "evaluation.json").read_text(encoding="utf-8"))
    assert record["questions"] >= 2000
    results = {precision: record[precision] for precision in ("W16A16", "W4A16")}
    assert record["missed_gates"] == missed_gates(results)
    sixteen, four = (results[precision]["exact_match"] for precision in ("W16A16", "W4A16"))
    assert sixteen >= 0.95
    assert four >= 0.95
    assert four >= sixteen - 0.015
    card = (DEMO_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert [gate for gate in record["missed_gates"] if gate not in card] == []


def test_the_recorded_evaluation_passes_every_gate():
    record = json.loads((DEMO_CHECKPOINT / "evaluation.json").read_text(encoding="utf-8"))
    results = {precision: record[precision] for precision in ("W16A16", "W4A16")}
    assert missed_gates(results) == []


def test_held_out_questions_are_answered(engine, sample):
    prompts = [(item.prompt, [item.image] if item.image else []) for item in sample]
    answers = engine.generate_batch(prompts, GREEDY)
    wrong = [
        (item.prompt, item.question.answer, text)
        for item, text in zip(sample, answers, strict=True)
        if text.strip() != item.question.answer
    ]
    assert len(sample) >= 100
    assert len(wrong) <= 0.1 * len(sample), wrong


def test_true_answers_are_likely(sample):
    tokenizer = _tokenizer()
    for precision in ("W16A16", "W4A16"):
        network = load_network(DEMO_CHECKPOINT, precision)
        losses = answer_losses(network, tokenizer, sample[:48])
        total, tokens = (sum(column) for column in zip(*losses, strict=True))
        assert total / tokens < 0.1


def test_the_example_is_answered_truly_though_sampled(engine):
    params = SamplingParams(temperature=0.2, max_new_tokens=40, seed=7)
    for colour, shape in (("red", "circle"), ("blue", "star"), ("green", "square")):
        prompt = "USER: What is in this image?\n<image> ASSISTANT:"
        images = [simple_scene(colour, shape)]
        text = "".join(delta.text for delta in engine.generate(prompt, images, params))
        assert text.strip() == f"The image shows a {colour} {shape}."


@pytest.mark.parametrize("system", [VICUNA_V1, LLAVA_V1, "You are a pirate.", ""])
@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat color is the square?", "<image>\nWhat colour is the square?",
        "<image>\nTell me the colour of the square.", "<image> Which colour is the square?",
    ],
)  # fmt: skip
def test_phrasings_and_system_prompts(engine, system, question):
    image = draw([SceneObject("square", "green", 0.3), SceneObject("ring", "red", 0.75)])
    assert _ask(engine, question, image, system) == "It is green."


@pytest.mark.parametrize("system", [VICUNA_V1, LLAVA_V1, "You are a pirate.", ""])
@pytest.mark.parametrize(
    "question", ["What is in this image?\n<image>", "Describe the picture. <image>"]
)
def test_a_question_may_stand_before_the_picture(engine, system, question):
    image = draw([SceneObject("square", "green", 0.3), SceneObject("ring", "red", 0.75)])
    answer = _ask(engine, question, image, system)
    assert answer == "The image shows a green square and a red ring."


@pytest.mark.parametrize("system", [VICUNA_V1, LLAVA_V1, "You are a pirate.", ""])
def test_a_colour_may_be_asked_before_the_picture(engine, system):
    image = draw([SceneObject("square", "green", 0.3), SceneObject("ring", "red", 0.75)])
    assert (
        _ask(engine, "What is the color of the square?\n<image>", image, system) == "It is green."
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Is the square to the left or to the right of the ring?", "It is to the left."),
        ("Is the ring to the left or to the right of the square?", "It is to the right."),
        ("Is the red ring above or below the green square?", "It is below."),
        ("Seen from the red ring, is the square above or below?", "It is above."),
    ],
)
@pytest.mark.parametrize("form", ["<image>\n{}", "{}\n<image>"])
def test_sides_may_be_asked_before_the_picture_or_after_it(engine, form, question, answer):
    objects = [
        SceneObject("square", "green", 0.3, 0.25, 0.3),
        SceneObject("ring", "red", 0.75, 0.7, 0.3),
    ]
    assert _ask(engine, form.format(question), draw(objects)) == answer


@pytest.mark.parametrize("size", [(96, 96), (336, 336), (640, 480), (480, 640), (800, 400)])
@pytest.mark.parametrize("background", ["white", "lightblue", "#404048"])
def test_canvases_and_backgrounds(engine, size, background):
    image = draw([SceneObject("circle", "red", size=0.6)], size, background)
    answer = _ask(engine, "<image>\nDescribe the picture.", image)
    assert answer == "The image shows a red circle."


def test_jpeg(engine):
    data = io.BytesIO()
    draw_number("42", size=(400, 300)).save(data, "JPEG", quality=50)
    answer = _ask(engine, "<image>\nWhat number is written here?", Image.open(data))
    assert answer == "The number is 42."


def test_a_second_turn(engine):
    image = draw([SceneObject("star", "blue", 0.25), SceneObject("cross", "orange", 0.75)])
    first = "<image>\nHow many objects are there? ASSISTANT: There are two.</s>USER: "
    assert _ask(engine, f"{first}What shape is the orange object?", image) == "It is a cross."


def test_without_a_picture_it_asks_for_one_and_off_its_subject_it_says_so(engine):
    assert _ask(engine, "What is in this image?", None) == "Please send a picture first."
    assert _ask(engine, "Write a poem about the sea.", None).startswith("I can only answer")
