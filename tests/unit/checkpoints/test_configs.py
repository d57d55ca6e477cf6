"""Every wrong value in a JSON file is reported with its key and its file; nothing in it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints import open_checkpoint
from models.checkpoints.language_config import read_language_config
from models.errors import CheckpointError
from models.json_config import JsonConfig
from models.language.kv_cache import head_dim
from models.vision import load_vision
from tests.checkpoint_files import rewrite_json
from tests.tiny import write_tiny_llava, write_tiny_vila

TOWER = "clip-tiny/config.json"
PROCESSOR = "clip-tiny/preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ("config.json", {"vocab_size": "400"}, "vocab_size is '400'; it must be of type int"),
        ("config.json", {"num_hidden_layers": True}, "num_hidden_layers is True; it must be"),
        ("config.json", {"num_key_value_heads": "two"}, "model_type is 'llava'; its config does"),
        ("config.json", {"architectures": ["LlavaMptForCausalLM"]}, "model family 'mpt'"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the MLP of these families"),
        ("config.json", {"architectures": ["LlavaGemmaForCausalLM"]},
         "unknown language model family 'gemma'; known: llama, mistral, qwen2"),
        ("config.json", {"architectures": [], "model_type": "bert"}, "family 'bert'; known: llama"),
        ("config.json", {"image_aspect_ratio": "crop"}, "unknown image_aspect_ratio 'crop'"),
        ("config.json", {"mm_vision_select_layer": -5}, "mm_vision_select_layer is -5; the tower"),
        ("config.json", {"mm_vision_select_layer": 4}, "mm_vision_select_layer is 4; the tower"),
        ("config.json", {"mm_vision_select_feature": "cls"}, "'cls'; known: patch, cls_patch"),
        ("config.json", {"mm_projector_type": "resampler"}, "mm_projector_type 'resampler'; known"),
        ("config.json", {"mm_vision_tower": 3}, "mm_vision_tower is 3; it must be of type str"),
        (TOWER, {"model_type": "vit"}, "unknown vision tower 'vit'; known: clip, siglip"),
        (TOWER, {"model_type": None}, f"{TOWER} lacks 'model_type'"),
        (TOWER, {"hidden_size": "wide"}, f"{TOWER}: model_type is 'clip_vision_model'; its config"),
        (TOWER, {"image_size": 48}, f"{PROCESSOR} makes pictures of 32 pixels, but"),
        (PROCESSOR, {"do_normalize": False}, f"{PROCESSOR}: do_normalize is False; only true"),
        (PROCESSOR, {"do_center_crop": False}, "do_center_crop is False; without it"),
        (PROCESSOR, {"crop_size": 64}, "crop_size is 64; it must not be above size (32)"),
        (PROCESSOR, {"size": {"longest_edge": 3}}, "size is {'longest_edge': 3}; it must"),
        (PROCESSOR, {"size": {"height": 32, "width": 30}}, "it must be a number of pixels"),
        (PROCESSOR, {"size": 0}, "size is 0; it must be a number of pixels"),
        (PROCESSOR, {"image_mean": [0.5]}, "image_mean is [0.5]; it must be three numbers"),
        (PROCESSOR, {"image_std": None}, f"{PROCESSOR} lacks 'image_std'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_key(
    file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / file, **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(folder, precision="W16A16")
        load_vision(checkpoint, torch.device("cpu"), torch.float32)
    assert message in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", TOWER, PROCESSOR])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "must hold a JSON object")],
)
def test_a_file_that_is_no_config_is_named(
    file: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = write_tiny_llava(tmp_path / "tiny") / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    expected = f"^{file} {message}"
    if file == "config.json" and content is None:
        expected = (
            f"^{path.parent} has no config.json"  # it tells a checkpoint's folder from others
        )
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tmp_path / "tiny")


def test_code_named_by_a_config_is_never_imported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (write_tiny_llava(tmp_path / "llava"), write_tiny_vila(tmp_path / "vila")):
        marker = tmp_path / "owned"
        for part in [folder, *(f for f in folder.iterdir() if f.is_dir())]:
            (part / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        for config in folder.rglob("config.json"):
            rewrite_json(config, auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
        caplog.clear()
        open_checkpoint(folder)
        assert not marker.exists()
        assert "(auto_map), which is never run; the checkpoint is served by" in caplog.text
        assert f"layout '{folder.name}'" in caplog.text
    rewrite_json(tmp_path / "llava/config.json", mm_vision_tower=None)
    with pytest.raises(CheckpointError, match="the code that auto_map names is never run"):
        open_checkpoint(tmp_path / "llava")
    assert not marker.exists()


def test_a_config_is_read_by_type() -> None:
    config = JsonConfig({"i": 3, "f": 0.5, "b": True, "none": None, "sub": {"x": 1}}, "a.json")
    assert config.get("f", float, 0.0) == 0.5
    assert config.get("i", float, 0.0) == 3.0 and isinstance(config.get("i", float, 0.0), float)
    assert config.get("none", int, 7) == 7 and "none" not in config
    with pytest.raises(CheckpointError, match="a.json: b is True; it must be of type int"):
        config.get("b", int, 0)
    with pytest.raises(CheckpointError, match=r"a.json \(sub\) lacks 'y'"):
        config.sub("sub").require("y", int)


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({}, 1024),
        ({"max_position_embeddings": 512}, 512),
        ({"max_sequence_length": 300}, 300),
        ({"model_max_length": 200}, 200),
        ({"max_sequence_length": 300, "model_max_length": 200}, 300),
    ],
)
def test_the_context_is_what_the_config_says_most_plainly(
    keys: dict[str, int], length: int, tmp_path: Path
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / "config.json", **keys)
    assert open_checkpoint(folder).spec.context_length == length


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"architectures": ["LlavaMistralForCausalLM"], "sliding_window": 256}, 256),
        ({"architectures": [], "model_type": "llava_mistral", "sliding_window": 256}, 256),
        ({"architectures": ["LlavaMistralForCausalLM"], "sliding_window": 2000}, None),
        ({"architectures": ["LlavaQwenForCausalLM"], "sliding_window": 256,
          "use_sliding_window": True, "max_window_layers": 1}, 256),
        # As Qwen2 is released: a window that is not used, or by none of the layers.
        ({"architectures": ["LlavaQwenForCausalLM"], "sliding_window": 256}, None),
        ({"architectures": ["LlavaQwenForCausalLM"], "sliding_window": 256,
          "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"architectures": ["LlavaLlamaForCausalLM"], "sliding_window": 256}, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_context_ends_with_a_sliding_window_and_the_log_says_so(
    keys: dict[str, Any], window: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / "config.json", **keys)
    assert open_checkpoint(folder).spec.context_length == (window or 1024)
    message = "sliding_window is 256; sliding attention is not supported"
    assert (message in caplog.text) == (window is not None)


def test_a_window_of_null_is_none_and_not_mistrals_default(tmp_path: Path) -> None:
    """Mistral's second version, and so LLaVA-1.6's: null, where a missing key means 4096."""
    folder = write_tiny_llava(tmp_path / "tiny")
    path = folder / "config.json"
    rewrite_json(path, architectures=["LlavaMistralForCausalLM"], max_position_embeddings=32768)
    assert open_checkpoint(folder).spec.context_length == 4096
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sliding_window": None}))
    assert open_checkpoint(folder).spec.context_length == 32768


@pytest.mark.parametrize(
    ("architecture", "model_type", "family"),
    [
        ("LlavaLlamaForCausalLM", "llava", "llama"),
        ("LlavaLlamaForCausalLM", "llava_llama", "llama"),
        ("LlavaMistralForCausalLM", "llava_mistral", "mistral"),
        ("LlavaMistralForCausalLM", "llava", "mistral"),
        ("LlavaQwenForCausalLM", "llava_qwen", "qwen2"),
        ("Qwen2ForCausalLM", "qwen2", "qwen2"),
        (None, "llava", "llama"),
        (None, "llava_mistral", "mistral"),
        (None, "mistral", "mistral"),
    ],
)
def test_the_family_by_the_names_that_released_configs_have(
    architecture: str | None, model_type: str, family: str
) -> None:
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 64
    )
    values = {**sizes, "num_attention_heads": 4, "model_type": model_type}
    if architecture is not None:
        values["architectures"] = [architecture]
    assert read_language_config(JsonConfig(values, "config.json")).model_type == family


def test_yis_34b_is_read_as_the_llama_that_it_is() -> None:
    """The numbers of LLaVA-1.6-34B's config."""
    config = read_language_config(JsonConfig({
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 7168,
        "intermediate_size": 20480, "num_attention_heads": 56, "num_hidden_layers": 60,
        "num_key_value_heads": 8, "vocab_size": 64000, "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-05, "max_position_embeddings": 4096, "attention_bias": False,
    }, "config.json"))  # fmt: skip
    assert (config.model_type, head_dim(config), config.num_key_value_heads) == ("llama", 128, 8)
    assert config.rope_parameters["rope_theta"] == 5e6


def test_a_longer_model_max_length_scales_vilas_positions(tmp_path: Path) -> None:
    """VILA's rule (context_length_extension): linear, by the rounded-up ratio."""
    folder = write_tiny_vila(tmp_path / "vila-tiny", context_length=1024)
    path = folder / "llm/config.json"
    assert open_checkpoint(folder).spec.language.rope_parameters["rope_type"] == "default"
    rewrite_json(path, model_max_length=2500)
    spec = open_checkpoint(folder).spec
    assert spec.context_length == 2500
    assert spec.language.rope_parameters["rope_type"] == "linear"
    assert spec.language.rope_parameters["factor"] == 3.0
    rewrite_json(path, rope_scaling={"type": "dynamic", "factor": 8.0})
    spec = open_checkpoint(folder).spec
    assert spec.language.rope_parameters["rope_type"] == "dynamic"


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_spellings_of_rope_scaling_are_read(key: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(
        folder / "config.json", rope_theta=5000.0, rope_scaling={key: "linear", "factor": 4.0}
    )
    parameters = open_checkpoint(folder).spec.language.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == ("linear", 4.0)
    assert parameters["rope_theta"] == 5000.0


def test_tied_embeddings_are_upstreams_default_no(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / "config.json", tie_word_embeddings=None)
    assert open_checkpoint(folder).spec.language.tie_word_embeddings is False


def test_a_whole_clip_config_is_read_by_its_vision_half(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    half = json.loads((folder / TOWER).read_text())
    (folder / TOWER).write_text(json.dumps({
        "model_type": "clip", "projection_dim": 32, "text_config": {"hidden_size": 7},
        "vision_config": {**half, "model_type": "clip_vision_model"},
    }))  # fmt: skip
    assert open_checkpoint(folder).spec.vision.config.hidden_size == 64


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("shortest_edge", 32, 32)),
        ({"size": 32, "crop_size": 32}, ("shortest_edge", 32, 32)),
        ({"size": {"shortest_edge": 40}}, ("shortest_edge", 40, 32)),
        ({"size": {"height": 40, "width": 40}}, ("square", 40, 32)),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, ("square", 32, 32)),
    ],
)
def test_sizes_in_all_their_spellings(
    change: dict[str, Any], expected: tuple[str, int, int], tmp_path: Path
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / PROCESSOR, **change)
    preprocessing = open_checkpoint(folder).spec.vision.preprocessing
    assert (preprocessing.resize, preprocessing.size, preprocessing.crop_size) == expected
