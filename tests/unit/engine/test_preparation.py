"""Whatever is wrong with a request is found before it is queued, and its field is named."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from PIL import Image

from models.checkpoints import open_checkpoint
from models.engine.preparation import RequestPreparer
from models.engine.sampling_params import SamplingParams
from models.errors import InvalidRequest, TinyChatError
from models.prompts import IMAGE_TOKEN_ID, load_tokenizer
from models.vision import ImagePreprocessor
from tests.tiny import write_tiny_llava

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
PARAMS = SamplingParams()


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> RequestPreparer:
    folder = write_tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny", awq=False)
    spec = open_checkpoint(folder, precision="W16A16").spec
    preprocessor = ImagePreprocessor(spec.vision.preprocessing, 16)
    return RequestPreparer(spec, load_tokenizer(folder), preprocessor, max_model_len=100)


def truncated() -> Image.Image:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:-2000]))  # its header is whole


@pytest.mark.parametrize(
    ("prompt", "images", "field", "message"),
    [
        (None, [], "prompt", "is NoneType; it must be a string"),
        (b"text", [], "prompt", "is bytes; it must be a string"),
        (["text"], [], "prompt", "is list; it must be a string or a list of token ids"),
        ([3, True], [], "prompt", "is list; it must be a string or a list of token ids"),
        ([3, 400], [], "prompt", "400 is outside of the vocabulary"),
        ([IMAGE_TOKEN_ID], [], "prompt", "-200 is outside of the vocabulary"),
        ([3], [PICTURE], "prompt", "one about pictures must be text"),
        ([], [], "prompt", "is empty"),
        ([3] * 100, [], "prompt", "must fit into the context of 100"),
        ("half \ud83d", [], "prompt", "half of a surrogate pair"),
        ("x " * 200, [], "prompt", "must fit into the context of 100; shorten it"),
        ("<image>" * 7, [PICTURE] * 7, "prompt", "pictures included"),
        ("no placeholder", [PICTURE], "images", "1 given, but 0 <image> in the prompt"),
        ("<image>", [], "images", "0 given, but 1 <image> in the prompt"),
        ("<image><image>", [PICTURE], "images", "1 given, but 2 <image>"),
        ("<image>", ["/etc/passwd"], "images", "number 1 is str; it must be a PIL image"),
        ("<image>", [None], "images", "number 1 is NoneType; it must be a PIL image"),
        ("<image><image>", [PICTURE, truncated()], "images", "number 2 cannot be decoded"),
        ("<image>", [PICTURE.convert("LA").convert("La")], "images", "number 1 cannot be decoded"),
    ],
)
def test_a_wrong_request_is_refused_with_its_field(
    preparer: RequestPreparer, prompt: Any, images: list[Image.Image], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        preparer.prepare(prompt, images, PARAMS)
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")
    assert message in str(caught.value)
    assert isinstance(caught.value, TinyChatError) and isinstance(caught.value, ValueError)
    assert "0x" not in str(caught.value) and "/etc" not in str(caught.value)


@pytest.mark.parametrize("token", [400, 10**9])
def test_a_stop_token_outside_of_the_vocabulary_is_refused(
    preparer: RequestPreparer, token: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"^stop_token_ids: {token} is outside of the vocabul"):
        preparer.prepare("x", [], SamplingParams(stop_token_ids=(3, token)))
    preparer.prepare("x", [], SamplingParams(stop_token_ids=(3, 399)))


def test_a_request_that_is_too_long_costs_no_preprocessing(
    preparer: RequestPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a picture was preprocessed")

    monkeypatch.setattr(ImagePreprocessor, "__call__", fail)
    for prompt, count in (("<image>" * 7, 7), ("x", 1), ("<image> " + "x " * 90, 1)):
        with pytest.raises(InvalidRequest):
            preparer.prepare(prompt, [PICTURE] * count, PARAMS)


def test_the_context_may_be_filled_but_for_one_token(preparer: RequestPreparer) -> None:
    """The limit is of prompt and answer together, so an answer of one token still fits."""
    one = len(preparer.prepare("12", [], PARAMS).token_ids)
    per = len(preparer.prepare("1212", [], PARAMS).token_ids) - one
    longest = "12" * ((99 - one) // per + 1)
    assert len(preparer.prepare(longest, [], PARAMS).token_ids) <= 99
    with pytest.raises(InvalidRequest, match="has 1[0-9][0-9] tokens"):
        preparer.prepare(longest + "12", [], PARAMS)


def test_pictures_take_their_positions_in_order(preparer: RequestPreparer) -> None:
    other = Image.new("RGB", (30, 40), (0, 0, 255))
    request = preparer.prepare("a <image> b <image>", [PICTURE, other], PARAMS)
    first, second = request.images
    assert first.image.digest == preparer.preprocessor(PICTURE).digest
    assert second.image.digest == preparer.preprocessor(other).digest
    positions = [i for i, token in enumerate(request.token_ids) if token == IMAGE_TOKEN_ID]
    assert positions == [*range(first.start, first.end), *range(second.start, second.end)]
    assert first.end - first.start == second.end - second.start == 16 and first.end < second.start


def test_token_ids_are_a_prompt_as_they_are(preparer: RequestPreparer) -> None:
    ids = preparer.prepare("some text", [], PARAMS).token_ids
    for given in (ids, tuple(ids), ids[1:]):  # no beginning of the sequence is added
        assert preparer.prepare(given, [], PARAMS).token_ids == list(given)


@pytest.mark.parametrize("prompt", ["", "text", "<image>", "a <image> b <image>\n</s>"])
def test_tokens_are_counted_without_the_pictures(preparer: RequestPreparer, prompt: str) -> None:
    request = preparer.prepare(prompt, [PICTURE] * prompt.count("<image>"), PARAMS)
    assert preparer.count_tokens(prompt) == len(request.token_ids)


def test_ids_and_deadlines(preparer: RequestPreparer) -> None:
    plain = preparer.prepare("x", [], PARAMS)
    assert plain.deadline is None and plain.request_id
    assert plain.request_id != preparer.prepare("x", [], PARAMS).request_id
    before = time.monotonic()
    request = preparer.prepare("x", [], PARAMS, request_id="mine", queue_timeout_s=5.0)
    assert request.request_id == "mine" and request.deadline is not None
    assert before + 5 <= request.deadline <= time.monotonic() + 5


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("", [1]), ("\0", None), ("<vila/video>", None), ("\N{GRINNING FACE}", None)],
)
def test_odd_prompts_are_prompts(
    preparer: RequestPreparer, prompt: str, ids: list[int] | None
) -> None:
    got = preparer.prepare(prompt, [], PARAMS).token_ids
    assert got == (ids or got) and all(0 <= token < 400 for token in got)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_the_thinnest_pictures_of_every_mode_are_served(
    preparer: RequestPreparer, size: tuple[int, int], mode: str
) -> None:
    request = preparer.prepare("<image>", [Image.new(mode, size)], PARAMS)
    assert request.images[0].image.pixel_values.shape == (1, 3, 32, 32)
