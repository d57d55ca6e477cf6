"""`args:` of serve_config.yaml: what is refused, and whether the message helps."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from deployments.config import AppConfig
from models import EngineOptions
from models.language.attention_backends import ATTENTION_BACKENDS
from tests.unit.deployments.harness import make_config


def refusal(**options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make_config(**options)
    return str(caught.value)


def test_a_model_path_is_all_that_is_needed() -> None:
    config = make_config()
    assert (config.precision, config.device, config.dtype) == ("W4A16", "auto", "auto")
    assert (config.default_max_new_tokens, config.max_new_tokens_cap) == (256, 1024)
    assert config.controller_addr == "http://localhost:21001"
    assert config.worker_addr == "http://localhost:21002"
    with pytest.raises(ValidationError, match="model_path"):
        AppConfig.model_validate({})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model_pth", "did you mean 'model_path'?"),
        ("max-num-seqs", "did you mean 'max_num_seqs'?"),
        ("Precision", "did you mean 'precision'?"),
        ("quant", "did you mean 'quant_path'?"),
        ("controller_address", "did you mean 'controller_addr'?"),
        ("worker_address", "did you mean 'worker_addr'?"),
        ("num_replicas", "belongs under `deployments:`"),
        ("max_ongoing_requests", "belongs under `deployments:`"),
        ("autoscaling_config", "belongs under `deployments:`"),
        ("port", "belongs under `http_options:`"),
        ("zzzz", "known keys are model_path, quant_path, precision"),
    ],
)
def test_an_unknown_key_is_refused_with_a_hint(key: str, hint: str) -> None:
    message = refusal(**{key: 1})
    assert repr(key) in message
    assert hint in message


def test_args_that_are_no_mapping_are_refused() -> None:
    wrong: list[object] = [[], "demo", None]
    for args in wrong:
        with pytest.raises(ValidationError):
            AppConfig.model_validate(args)


@pytest.mark.parametrize(
    ("options", "hints"),
    [
        ({"precision": "W16A16", "quant_path": "q.pt"}, ["quant_path", "W4A16"]),
        ({"limit_model_concurrency": 5, "max_num_seqs": 6}, ["two names", "5", "6"]),
        ({"default_max_new_tokens": 300, "max_new_tokens_cap": 200}, ["300", "200", "cap"]),
        ({"device": "cuda:1"}, ["CUDA_VISIBLE_DEVICES"]),
        ({"device": "tpu"}, ["auto", "cuda", "cpu"]),
        ({"precision": "W8A8"}, ["W4A16", "W16A16"]),
        ({"model_type": "opt"}, ["model_type", "'opt'"]),
    ],
)
def test_an_impossible_combination_is_refused_and_explained(
    options: dict[str, Any], hints: list[str]
) -> None:
    message = refusal(**options)
    assert all(hint in message for hint in hints)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_seqs", "many"),
        ("max_waiting", -1),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("queue_timeout_s", 0),
        ("queue_timeout_s", float("nan")),
        ("sign_of_life_s", 0),
        ("max_records_per_s", 0),
        ("max_new_tokens_cap", 0),
        ("max_new_tokens_cap", 1 << 31),
        ("max_body_bytes", 10),
        ("max_image_side", 0),
        ("num_threads", 0),
        ("model_name", ""),
        ("worker_id", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(key: str, value: object) -> None:
    assert key in refusal(**{key: value})


def test_an_empty_model_path_is_refused() -> None:
    with pytest.raises(ValidationError, match="model_path"):
        make_config(model_path="")


def test_the_limit_of_running_requests_has_two_names() -> None:
    assert make_config().running_limit is None
    assert make_config(max_num_seqs=3).running_limit == 3
    assert make_config(limit_model_concurrency=5).running_limit == 5
    both = make_config(limit_model_concurrency=5, max_num_seqs=5)
    assert both.running_limit == 5


def test_an_unknown_conversation_template_is_answered_with_the_known_ones() -> None:
    assert make_config(conv_mode="llava_v1").conv_mode == "llava_v1"
    assert "known are vicuna_v1" in refusal(conv_mode="vicuna")


def test_model_type_is_tinychats_whatever_its_case() -> None:
    assert make_config(model_type="llama").model_type == "LLaMa"


@pytest.mark.parametrize("field", ["controller_addr", "worker_addr"])
class TestAddresses:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ("http://192.0.2.1:21002", "http://192.0.2.1:21002"),
            ("http://192.0.2.1:21002/", "http://192.0.2.1:21002"),
            ("https://models.example/llava//", "https://models.example/llava"),
            ("http://[2001:db8::1]:21002", "http://[2001:db8::1]:21002"),
        ],
    )
    def test_an_address_is_kept_without_its_last_slash(
        self, field: str, given: str, kept: str
    ) -> None:
        config = make_config(**{field: given})
        assert getattr(config, field) == kept

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "localhost:21001",
            "192.0.2.1",
            "ftp://192.0.2.1",
            "file:///etc/passwd",
            "http://",
            "http://:21001",
            "http://user:secret@192.0.2.1",
            "http://192.0.2.1:port",
            "http://192.0.2.1:99999",
            "http://192.0.2.1:0",
            "http://[::1",
            "http://192.0.2.1/?a=b",
            "http://192.0.2.1/#a",
            "http://good.example\\@evil.example",
            "http://good.example\\evil.example",
            "http://192.0.2.1 :21001",
            "http://192.0.2.1\n:21001",
            "http://192.0.2.1:21001\n",
        ],
    )
    def test_what_is_no_address_is_refused(self, field: str, value: str) -> None:
        message = refusal(**{field: value})
        assert field in message
        assert "address" in message


def test_engine_options_are_those_of_the_engine() -> None:
    """`load_engine` gets them as they are, so names and defaults must be its own."""
    options = make_config().engine_options()
    assert EngineOptions(**options) == EngineOptions()
    known = {field.name for field in dataclasses.fields(EngineOptions)}
    assert set(options) == known - {"max_num_seqs"}  # `running_limit` and the door decide that one


def test_every_setting_is_described() -> None:
    undescribed = [n for n, field in AppConfig.model_fields.items() if not field.description]
    assert undescribed == []


def test_a_configuration_cannot_be_changed_later() -> None:
    config = make_config()
    with pytest.raises(ValidationError):
        config.model_path = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "host", ["images.example.org", "*.example.org", "*", "10.0.0.7:8080", "[::1]"]
)
def test_hosts_of_pictures_are_names(host: str) -> None:
    assert make_config(allowed_image_hosts=[host]).allowed_image_hosts == [host]


@pytest.mark.parametrize("host", ["", "http://example.org", "a/b", "user@host", "a b", "a\\b"])
def test_and_nothing_else(host: str) -> None:
    with pytest.raises(ValidationError, match="is no host"):
        make_config(allowed_image_hosts=[host])


def test_the_attention_backends_are_those_of_the_engine() -> None:
    annotation = AppConfig.model_fields["attention_backend"].annotation
    assert set(get_args(annotation)) == {"auto", *ATTENTION_BACKENDS}
