"""Both layouts, in both precisions, load and answer through `load_engine`, from every place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from models import Engine, SamplingParams, load_engine
from models.errors import CheckpointError, ConfigurationError
from models.native import kernels
from tests.checkpoint_files import awq_file, rewrite_json
from tests.parity.test_tokens import QUESTIONS, WIDE
from tests.tiny import write_tiny_llava, write_tiny_vila
from tests.unit.engine.harness import core_of

GREEDY = SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True)
PROMPT = QUESTIONS[1][0]
Precision = Literal["W4A16", "W16A16"]
both_precisions = pytest.mark.parametrize("precision", ["W4A16", "W16A16"])
both_layouts = pytest.mark.parametrize("layout", ["llava", "vila"])


def load(folder: Path, precision: Precision = "W16A16", **options: Any) -> Engine:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1}
    return load_engine(folder, precision=precision, **{**defaults, **options})


def answer(folder: Path, precision: Precision = "W16A16", **options: Any) -> str:
    with load(folder, precision, **options) as engine:
        (text,) = engine.generate_batch([(PROMPT, [WIDE])], GREEDY)
    assert text
    return text


def write(layout: str, folder: Path, **options: Any) -> Path:
    return (write_tiny_llava if layout == "llava" else write_tiny_vila)(folder, **options)


@both_layouts
@both_precisions
def test_each_layout_answers_in_each_precision_by_default(
    layout: str, precision: Precision, tmp_path: Path
) -> None:
    """device and dtype left to us: bf16 and the 4-bit kernel on a CPU."""
    folder = write(layout, tmp_path / "tiny")
    with load_engine(folder, precision=precision, num_threads=1) as engine:
        said = engine.description()
        (text,) = engine.generate_batch([(PROMPT, [WIDE])], GREEDY)
    assert text and (said["layout"], said["precision"]) == (layout, precision)
    if not torch.cuda.is_available():
        assert said["dtype"] == "bfloat16"
        int4 = "cpu_native" if kernels() else "cpu_int4_bf16"
        assert said["backend"] == (int4 if precision == "W4A16" else "torch")
        linear = core_of(engine).runner.decoder.model.layers[0].mlp.down_proj  # type: ignore[union-attr]
        assert getattr(linear, "backend", "torch") == said["backend"]


@both_layouts
@both_precisions
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_any_files_of_the_same_tensors_give_the_same_answer(
    layout: str, precision: Precision, file_format: str, shards: int, tmp_path: Path
) -> None:
    plain = answer(write(layout, tmp_path / "plain"), precision)
    cut = write(layout, tmp_path / "cut", file_format=file_format, shards=shards)
    assert answer(cut, precision) == plain


@both_layouts
def test_a_quantised_checkpoint_needs_no_16_bit_weights(layout: str, tmp_path: Path) -> None:
    """VILA's then has a stale index in `llm/`, as the released ones."""
    whole = write(layout, tmp_path / "whole")
    assert answer(write(layout, tmp_path / "four", awq_only=True), "W4A16") == answer(
        whole, "W4A16"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_awq_file_may_hold_projector_and_tower_too(dtype: torch.dtype, tmp_path: Path) -> None:
    apart = write_tiny_llava(tmp_path / "apart", dtype=dtype)
    together = write_tiny_llava(
        tmp_path / "together", dtype=dtype, awq_only=True, awq_holds_all=True
    )
    assert not list(together.glob("*.safetensors"))
    weight_map = {"model.mm_projector.0.weight": "model-00001-of-00002.safetensors"}
    index = together / "model.safetensors.index.json"  # stale, as beside VILA's released files
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert answer(together, "W4A16") == answer(apart, "W4A16")


@both_precisions
def test_the_tower_may_lie_in_its_own_folder(precision: Precision, tmp_path: Path) -> None:
    inside = write_tiny_llava(tmp_path / "inside", tower_inside=True)
    outside = write_tiny_llava(tmp_path / "outside", tower_inside=False)
    assert answer(outside, precision) == answer(inside, precision)


@both_precisions
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("aspect", ["pad", None])
def test_llavas_projectors_and_preprocessings_answer(
    precision: Precision, projector: str, aspect: str | None, tmp_path: Path
) -> None:
    folder = write_tiny_llava(
        tmp_path / "tiny", projector=projector, image_aspect_ratio=aspect, kv_heads=4
    )
    assert answer(folder, precision)


def test_what_the_config_says_of_pictures_changes_the_answer(tmp_path: Path) -> None:
    """So that none of the above is a setting that nobody reads."""
    written: list[dict[str, Any]] = [
        {}, {"image_aspect_ratio": None}, {"projector": "linear"}, {"seed": 1},
    ]  # fmt: skip
    answers = {
        answer(write_tiny_llava(tmp_path / str(i), **options)) for i, options in enumerate(written)
    }
    assert len(answers) == len(written)


def test_quant_path_is_where_the_4_bit_weights_come_from(tmp_path: Path) -> None:
    folder, other = (write_tiny_llava(tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    own = answer(folder, "W4A16")
    assert answer(folder, "W4A16", quant_path=awq_file(folder)) == own
    assert answer(folder, "W4A16", quant_path=awq_file(other)) != own


@pytest.mark.parametrize(
    ("name", "template"), [("llava-v1.5-tiny", "vicuna_v1"), ("llava-v1-tiny", "llava_v1")]
)
def test_the_template_follows_the_models_name(name: str, template: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / name)
    with load(folder) as engine:
        assert engine.spec.prompt.template == template
        assert engine.spec.name == name
    with load(folder, template="llava_v0") as engine:
        assert engine.spec.prompt.template == "llava_v0"
    with pytest.raises(ConfigurationError, match="unknown conversation template 'none'"):
        load(folder, template="none")


@both_layouts
@both_precisions
def test_what_is_wrong_with_a_checkpoint_is_said_and_nothing_starts(
    layout: str, precision: Precision, tmp_path: Path
) -> None:
    folder = write(layout, tmp_path / "tiny")
    config = folder / ("config.json" if layout == "llava" else "llm/config.json")
    rewrite_json(config, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+ is missing from"):
        load(folder, precision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device is 'mps'; it must be"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be auto or one of"),
        ({"precision": "W8A8"}, "precision is 'W8A8'; it must be one of"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be positive"),
        ({"kv_cache_bytes": 1000}, "the KV cache has room for 0 blocks of 16 tokens"),
        ({"gpu_memory_utilization": 1.5}, "must be at most 1"),
    ],
)
def test_options_that_cannot_be_fulfilled_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    with pytest.raises(ConfigurationError) as caught:
        load(folder, **options)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_surprise(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    with pytest.raises(ConfigurationError, match="torch sees no GPU here; use device: cpu or auto"):
        load(folder, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_layouts
@both_precisions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_answers_as_the_cpu(
    layout: str, precision: Precision, dtype: str, tmp_path: Path
) -> None:
    folder = write(layout, tmp_path / "tiny")
    got = answer(folder, precision, device="cuda", dtype=dtype)
    if dtype == "float32":
        assert got == answer(folder, precision, dtype=dtype)
