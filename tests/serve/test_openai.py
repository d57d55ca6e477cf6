"""OpenAI's API with its clients, unmodified, against the real application: true answers."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it tries to download one

import litellm
import openai
import pytest
import requests
from PIL import Image
from pydantic import BaseModel, ConfigDict
from ray import serve

from models.demo import simple_scene
from models.errors import InvalidRequest
from tests.serve.conftest import Deploy
from tests.serve.worker import Worker, base64_of, wait_until

MODEL = "llava-demo-4bit-AWQ"
RING = simple_scene("purple", "ring")
STAR = simple_scene("blue", "star")
ANSWER = "The image shows a purple ring."


def image(picture: Image.Image) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64_of(picture)}"},
    }


def about(picture: Image.Image, question: str = "What is in this image?") -> list[Any]:
    return [{"role": "user", "content": [image(picture), {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def client(demo: Worker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_picture_is_described(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=about(RING), temperature=0, max_completion_tokens=64
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    text_only = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is in this image?"}], max_tokens=1
    )
    assert text_only.usage is not None
    # The picture's own positions count.
    assert answer.usage.prompt_tokens > text_only.usage.prompt_tokens + 10


def test_streamed_it_is_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=about(RING), temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *rest, last = chunks
    assert rest[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in rest].count("stop") == 1
    assert rest[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 3


def test_several_turns_and_pictures(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            *about(RING),
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "What colour is the ring?"},
        ],
        temperature=0,
    )
    assert answer.choices[0].message.content == "It is purple."


def test_asynchronously_many_at_once(demo: Worker) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none") as client:

            async def ask(picture: Image.Image) -> str | None:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=about(picture), temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(picture) for picture in [RING, STAR] * 6))

    assert asyncio.run(ask_all()) == [ANSWER, "The image shows a blue star."] * 6
    demo.wait_until_empty()


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "purple", "blue"]
    shape: Literal["ring", "star"]


def test_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=about(RING), temperature=0, response_format=Shape
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert parsed.colour == "purple"
    for form in (
        {"guided_choice": ["It is red.", "It is purple.", "It is blue."]},
        {"guided_regex": r"It is (red|purple|blue)\."},
        {"structured_outputs": {"regex": r"It is (red|purple|blue)\."}},
    ):
        chosen = client.chat.completions.create(
            model=MODEL,
            messages=about(RING, "What colour is the ring?"),
            temperature=0,
            extra_body=form,
        )
        assert chosen.choices[0].message.content == "It is purple."


def test_structured_output_by_a_schema_streamed(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=about(RING), temperature=0, stream=True,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "shape", "schema": Shape.model_json_schema(), "strict": True},
        },
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert Shape.model_validate_json(text).colour == "purple"


def test_a_pathological_form_is_refused_and_stalls_nobody(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.chat.completions.create, model=MODEL, messages=about(RING), temperature=0
        )
        for pattern in ("(a{1000}){1000}", "(a+", "(" * 100):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(
                    model=MODEL, messages=about(RING), extra_body={"guided_regex": pattern}
                )
            assert caught.value.body["param"] == "guided_regex"  # type: ignore[index]
        assert answer.result(timeout=60).choices[0].message.content == ANSWER


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=about(RING), temperature=0, logprobs=True, top_logprobs=5,
        max_tokens=5,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 5
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
    spelled = b"".join(bytes(token.bytes or []) for token in logprobs.content).decode()
    assert spelled.strip() == (answer.choices[0].message.content or "").strip()


def test_logprobs_of_prompts(client: openai.OpenAI) -> None:
    """As lm-evaluation-harness asks for log-likelihoods, and as vLLM has them."""
    prompt = "USER: Hello ASSISTANT:"
    (choice,) = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    ).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.text_offset and logprobs.token_logprobs and logprobs.top_logprobs
    assert choice.text.startswith(prompt)
    ends = [*logprobs.text_offset[1:], len(choice.text)]
    pieces = [choice.text[a:b] for a, b in zip(logprobs.text_offset, ends, strict=True)]
    assert "".join(pieces) == choice.text
    assert pieces[-2:] == [":", choice.text.removeprefix(prompt)]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())

    (alone,) = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0
    ).choices
    assert alone.text == prompt
    assert alone.logprobs is not None
    assert alone.logprobs.token_logprobs == logprobs.token_logprobs[:-1]

    answer = client.chat.completions.create(
        model=MODEL, messages=about(RING), max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    scores: list[Any] = answer.prompt_logprobs  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert len(scores) == answer.usage.prompt_tokens
    assert scores.count(None) == 1 + 36  # the first, and the picture's
    assert all(entry["rank"] >= 1 for score in scores if score for entry in score.values())


def test_several_choices_with_one_seed_differ(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=about(RING), temperature=3, n=4, seed=5, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_completions(client: openai.OpenAI) -> None:
    prompt = "USER: Hello ASSISTANT:"
    whole = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5)
    chunks = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=5, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"


def test_completions_of_token_ids(client: openai.OpenAI, demo: Worker) -> None:
    prompt = "USER: Hello ASSISTANT:"
    ids = requests.post(f"{demo.url}/tokenize", json={"prompt": prompt}, timeout=60).json()
    given: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    text = client.completions.create(prompt=prompt, **given).choices[0].text
    answer = client.completions.create(prompt=[ids["tokens"]] * 2, echo=True, **given)
    assert [choice.text for choice in answer.choices] == [prompt + text] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * ids["count"]
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(prompt=[999_999], **given)


def test_a_seeded_answer_is_repeated(deploy: Deploy, tiny_llava: Any) -> None:
    """In float32, where a prompt from the cache gives the same numbers as a computed one."""
    exact = deploy("exact", model_path=str(tiny_llava), precision="W16A16", dtype="float32")
    with openai.OpenAI(base_url=f"{exact.url}/v1", api_key="none") as client:
        answers = [
            client.chat.completions.create(
                model="llava-tiny", messages=about(RING), temperature=3, seed=5, max_tokens=24, n=2
            )
            for _ in range(3)
        ]
    assert answers[1].usage is not None
    assert answers[1].usage.prompt_tokens_details is not None
    assert answers[1].usage.prompt_tokens_details.cached_tokens  # the second is from the cache
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][1]


def test_models_and_tokens(client: openai.OpenAI, demo: Worker) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve("llava-demo").id == MODEL
    body = {"prompt": "What is in this image?"}
    tokens = requests.post(f"{demo.url}/tokenize", json=body, timeout=60).json()["tokens"]
    back = requests.post(f"{demo.url}/detokenize", json={"tokens": tokens}, timeout=60).json()
    assert back == body
    for path in ("/health", "/ping", "/version", "/load", "/v1/models"):
        assert requests.get(f"{demo.url}{path}", timeout=60).status_code == requests.codes.ok


def test_errors_are_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=about(RING))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, stream=stream,
                messages=[{"role": "user", "content": "word " * 5000}],
            )  # fmt: skip
        assert "context" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}],
                }
            ],
        )
    assert "fetches none" in str(caught.value)


def test_a_full_server_is_unavailable_and_a_client_that_leaves_frees_it(
    deploy: Deploy, tiny_llava: Any
) -> None:
    full = deploy("full", model_path=str(tiny_llava), max_num_seqs=1, max_waiting=0)
    body = {
        "messages": about(RING), "stream": True, "ignore_eos": True, "max_tokens": 900,
    }  # fmt: skip
    with requests.post(
        f"{full.url}/v1/chat/completions", json=body, stream=True, timeout=60
    ) as response:
        lines = response.iter_lines()  # kept: an iterator that is let go hangs up
        assert next(lines).startswith(b"data: ")
        refused = requests.post(f"{full.url}/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == requests.codes.unavailable
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    full.wait_until_empty()
    with pytest.raises(requests.Timeout):  # before a whole answer has come
        requests.post(
            f"{full.url}/v1/chat/completions", json={**body, "stream": False}, timeout=0.2
        )
    full.wait_until_empty()


def test_litellm(demo: Worker) -> None:
    given: dict[str, Any] = {
        "model": f"openai/{MODEL}", "api_base": f"{demo.url}/v1", "api_key": "none",
        "messages": about(RING), "temperature": 0,
    }  # fmt: skip
    assert litellm.completion(**given).choices[0].message.content == ANSWER
    chunks = litellm.completion(**given, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER

    async def stream() -> str:
        chunks = await litellm.acompletion(**given, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(stream()) == ANSWER
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**given, "top_p": 7})


def test_vilas_own_route_with_vilas_own_client(demo: Worker) -> None:
    """serving/query_nvila.py is the openai package with another base address."""
    with openai.OpenAI(base_url=demo.url, api_key="fake-key") as client:
        chunks = client.chat.completions.create(
            model="LLaVA-Demo-AWQ", messages=about(RING), stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        whole: Any = client.chat.completions.create(model=MODEL, messages=about(RING))
        assert whole.choices[0].message.content[0]["text"] == ANSWER
        assert [model.id for model in client.models.list()] == [MODEL]


class TestHandle:
    def test_chat_answers_whole_and_streamed(self, demo: Worker) -> None:
        handle: Any = serve.get_app_handle("demo")
        request = {"messages": about(RING), "temperature": 0}
        whole = handle.chat.remote(request).result(timeout_s=60)
        assert whole["choices"][0]["message"]["content"] == ANSWER
        chunks = list(handle.options(stream=True).chat.remote({**request, "stream": True}))
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == ANSWER

    def test_chat_raises_what_is_wrong(self, demo: Worker) -> None:
        handle: Any = serve.get_app_handle("demo")
        with pytest.raises(InvalidRequest, match="messages"):
            handle.chat.remote({}).result(timeout_s=60)

    def test_a_caller_that_stops_reading_frees_the_place(self, demo: Worker) -> None:
        handle: Any = serve.get_app_handle("demo").options(stream=True)
        stream = handle.chat.remote(
            {"messages": about(RING), "stream": True, "ignore_eos": True, "max_tokens": 900}
        )
        next(iter(stream))
        wait_until(lambda: demo.stats()["num_running"] == 1, "it runs")
        stream.cancel()
        demo.wait_until_empty()

    def test_the_example_with_steps_before_and_behind(self, demo: Worker) -> None:
        from docs.examples.chat_pipeline import Finder, Report, Shrink

        file = io.BytesIO()
        RING.save(file, "PNG")
        pipeline = Finder.bind(Shrink.bind(), Report.bind(), "demo")
        finder: Any = serve.run(pipeline, name="finder", route_prefix="/find")
        try:
            found = finder.find.remote(file.getvalue(), "ring").result(timeout_s=60)
            assert (found["thing"], found["found"]) == ("ring", True)
            url = demo.url.replace("/demo", "/find")
            answer = requests.post(
                url, params={"thing": "star"}, data=file.getvalue(), timeout=60
            ).json()
            assert (answer["thing"], answer["found"]) == ("star", False)
        finally:
            serve.delete("finder")
