"""Where 4-bit weights may lie, how they are found and named, and what of them is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import WeightSource, open_checkpoint
from models.checkpoints.spec import Precision
from models.errors import CheckpointError
from models.language.loading import load_decoder
from models.vision import load_vision
from tests.checkpoint_files import Tensors, read_tensors, rewrite_tensors
from tests.tiny import write_tiny_llava, write_tiny_vila
from tests.unit.awq.rewriting import (
    PLACES,
    as_one_tensor_files,
    as_own_files,
    as_safetensors_beside,
    as_shards,
    as_torch_file,
    in_format,
    language_folder,
    take_awq,
)

CPU = torch.device("cpu")
WRITERS = {"llava": write_tiny_llava, "vila": write_tiny_vila}
LINEAR = "model.layers.1.mlp.up_proj"
every_layout = pytest.mark.parametrize("layout", WRITERS)
every_place = pytest.mark.parametrize("place", PLACES)


def write(layout: str, folder: Path, *, awq_only: bool = True) -> tuple[Path, Tensors]:
    """A small checkpoint without 4-bit weights, and those."""
    WRITERS[layout](folder, awq_only=awq_only, hidden=128, intermediate=128)
    return folder, take_awq(folder)


def assert_holds(language: WeightSource, v2: Tensors) -> None:
    """The very weights of the llm-awq v2 tensors, and what is not quantised."""
    plain = {n: t for n, t in v2.items() if n.rpartition(".")[2] in ("weight", "bias")}
    linears = {name.rpartition(".")[0] for name in v2.keys() - plain.keys()}
    assert set(language.quantized_linears()) == linears and len(linears) == 14
    for name, tensor in plain.items():
        assert torch.equal(language.get(name), tensor)
    for linear in linears:
        weight = language.quantized(linear)
        groups = weight.scale.shape[1]
        assert torch.equal(weight.scale.t(), v2[f"{linear}.scales"][:groups])
        zeros = (-weight.scale.float() * weight.zero).half().t()
        assert torch.equal(zeros, v2[f"{linear}.scaled_zeros"][:groups])


def load(folder: Path, quant_path: Path | None = None, precision: Precision = "W4A16") -> None:
    """All that `load_engine` reads of a checkpoint's tensors."""
    checkpoint = open_checkpoint(folder, quant_path, precision)
    load_vision(checkpoint, CPU, torch.float32)
    load_decoder(
        checkpoint.language, checkpoint.spec.language,
        max_positions=64, device=CPU, dtype=torch.float32, backend="reference",
    )  # fmt: skip


# ---- places ---------------------------------------------------------------------------------


@every_layout
@every_place
@pytest.mark.parametrize("name", ["llm-awq-v1", "autoawq-gemm", "compressed-tensors"])
def test_weights_of_any_format_are_found_at_any_place(
    layout: str, place: str, name: str, tmp_path: Path
) -> None:
    folder, v2 = write(layout, tmp_path / "tiny")
    PLACES[place](folder, in_format(v2, name))
    language = open_checkpoint(folder).language
    assert language.format_of(LINEAR) == name
    assert_holds(language, v2)
    load(folder)


@every_layout
@every_place
def test_a_quant_path_may_be_the_folder_of_any_of_them(
    layout: str, place: str, tmp_path: Path
) -> None:
    folder, v2 = write(layout, tmp_path / "tiny")
    PLACES[place](folder, in_format(v2, "llm-awq-v2"))
    for quant_path in (language_folder(folder), folder):
        assert_holds(open_checkpoint(folder, quant_path).language, v2)
        load(folder, quant_path)


@every_layout
@pytest.mark.parametrize("place", ["one-tensor files", "its own shards", "one .pt file"])
def test_a_quant_path_may_be_a_folder_elsewhere(layout: str, place: str, tmp_path: Path) -> None:
    folder, v2 = write(layout, tmp_path / "tiny", awq_only=False)
    elsewhere = tmp_path / "quantised"
    elsewhere.mkdir()
    PLACES[place](elsewhere, in_format(v2, "llm-awq-v1"))
    language = open_checkpoint(folder, elsewhere).language
    assert_holds(language, v2)
    assert "quantised" in language.where or language.where == "weights.pt"
    load(folder, elsewhere)
    with pytest.raises(CheckpointError, match="there are no 4-bit weights"):
        open_checkpoint(folder)


@every_layout
def test_weights_beside_16_bit_ones_are_found_and_both_precisions_load(
    layout: str, tmp_path: Path
) -> None:
    folder, v2 = write(layout, tmp_path / "tiny", awq_only=False)
    as_safetensors_beside(folder, in_format(v2, "autoawq-gemm"))
    beside = language_folder(folder) / "weights-w4.safetensors"
    for quant_path in (None, beside, beside.parent):
        checkpoint = open_checkpoint(folder, quant_path)
        assert_holds(checkpoint.language, v2)
        assert checkpoint.language.where.endswith("weights-w4.safetensors")
        load(folder, quant_path)
    load(folder, precision="W16A16")
    assert not open_checkpoint(folder, precision="W16A16").language.holds_quantized


@every_layout
def test_one_shard_stands_for_all(layout: str, tmp_path: Path) -> None:
    folder, v2 = write(layout, tmp_path / "tiny")
    as_shards(folder, in_format(v2, "compressed-tensors"))
    shard = language_folder(folder) / "model-00002-of-00003.safetensors"
    assert_holds(open_checkpoint(folder, shard).language, v2)


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq-gemm"])
def test_a_shard_that_is_absent_is_named_with_its_tensors(name: str, tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    as_shards(folder, in_format(v2, name))
    shard = folder / "llm/model-00002-of-00003.safetensors"
    lost = set(read_tensors(shard))
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    named = re.findall(r"(\S+) is missing: the index places it in (\S+),", str(caught.value))
    assert len(named) == 10 and {file for _, file in named} == {shard.name}
    assert {tensor for tensor, _ in named} <= lost
    assert f"and {len(lost) - 10} more" in str(caught.value)


def test_a_layer_of_which_nothing_is_left_is_missed_as_what_the_index_says(tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, "autoawq-gemm")
    kept = {name: t for name, t in tensors.items() if not name.startswith(f"{LINEAR}.")}
    as_own_files(folder, kept)
    weight_map = dict.fromkeys(kept, "model.safetensors")
    weight_map |= dict.fromkeys(tensors.keys() - kept.keys(), "more.safetensors")
    index = folder / "llm/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"{LINEAR}.qweight is missing: .* more.safetensors"):
        load(folder)


@pytest.mark.parametrize("other", [as_one_tensor_files, as_own_files, as_safetensors_beside])
def test_a_v2_file_goes_before_all_else(other: object, tmp_path: Path) -> None:
    folder, v2 = write("llava", tmp_path / "llava-tiny")
    other(folder, in_format(v2, "llm-awq-v1"))  # type: ignore[operator]
    torch.save(v2, folder / "z-awq-v2.pt")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.language.where == "z-awq-v2.pt"
    assert checkpoint.language.format_of(LINEAR) == "llm-awq-v2"
    load(folder)


def test_several_candidates_are_named(tmp_path: Path) -> None:
    folder, v2 = write("llava", tmp_path / "llava-tiny", awq_only=False)
    as_torch_file(folder, v2)
    as_safetensors_beside(folder, v2)
    with pytest.raises(CheckpointError, match=r"weights.pt, weights-w4.safetensors; name one of"):
        open_checkpoint(folder)
    for name in ("weights.pt", "weights-w4.safetensors"):
        assert open_checkpoint(folder, folder / name).language.where == name


def test_a_trainers_state_is_passed_over_but_never_run(tmp_path: Path) -> None:
    folder, v2 = write("llava", tmp_path / "llava-tiny")
    as_torch_file(folder, v2)
    torch.save({"state": {"step": 3}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"scale": [("a", ("b",), torch.ones(2))], "clip": []}, folder / "awq-search.pt")
    assert_holds(open_checkpoint(folder).language, v2)
    for name in ("optimizer.pt", "awq-search.pt"):
        with pytest.raises(CheckpointError, match=f"in {name} is not a dense tensor"):
            open_checkpoint(folder, folder / name)
    (folder / "awq-search.pt").write_bytes((folder / "weights.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="awq-search.pt is not a readable torch file"):
        open_checkpoint(folder)


def test_a_folder_without_4_bit_weights_is_refused_as_quant_path(tmp_path: Path) -> None:
    folder, _ = write("vila", tmp_path / "tiny", awq_only=False)
    for quant_path in (folder, folder / "llm", folder / "mm_projector"):
        with pytest.raises(
            CheckpointError, match="is a folder without a .pt file of 4-bit weights"
        ):
            open_checkpoint(folder, quant_path)
    shard = folder / "llm/model.safetensors"
    with pytest.raises(CheckpointError, match="llm/model.safetensors' holds no 4-bit weights"):
        open_checkpoint(folder, shard)


# ---- formats and their damage ---------------------------------------------------------------


def test_a_v1_file_named_as_v2_is_read_as_what_it_is(tmp_path: Path) -> None:
    folder, v2 = write("llava", tmp_path / "llava-tiny")
    torch.save(in_format(v2, "llm-awq-v1"), folder / "llava-w4-g128-awq-v2.pt")
    language = open_checkpoint(folder).language
    assert language.format_of(LINEAR) == "llm-awq-v1"
    assert_holds(language, v2)


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("llm-awq-v2", "qweight", r"has shape (31, 128), expected (32, 128)"),
        ("llm-awq-v1", "qweight", r"has shape (127, 16), expected "),
        ("llm-awq-v1", "scales", r"has shape (127, 8), expected (128, 8)"),
        ("autoawq-gemm", "qweight", r"has shape (127, 16), expected (128, 16) (llm-awq v1: (12"),
        ("autoawq-gemm", "qzeros", r"has shape (0, 16), expected (1, 16)"),
        ("compressed-tensors", "weight_packed", r"has shape (127, 16), expected (128, 16)"),
        ("compressed-tensors", "weight_zero_point", r"has shape (15, 1), expected (16, 1)"),
    ],
)
def test_a_cut_tensor_is_named_with_the_shapes_found_and_expected(
    name: str, suffix: str, message: str, tmp_path: Path
) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, name)
    tensors[f"{LINEAR}.{suffix}"] = tensors[f"{LINEAR}.{suffix}"][:-1].contiguous()
    as_own_files(folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    expected = f"{LINEAR}.{suffix} in llm/model.safetensors {message}"
    assert str(caught.value).startswith(f"language model: {expected}")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("llm-awq-v1", "qzeros"), ("llm-awq-v1", "scales"), ("autoawq-gemm", "qweight"),
     ("autoawq-gemm", "scales"), ("compressed-tensors", "weight_scale"),
     ("compressed-tensors", "weight_shape")],
)  # fmt: skip
def test_a_lost_tensor_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, name)
    del tensors[f"{LINEAR}.{suffix}"]
    as_own_files(folder, tensors)
    with pytest.raises(CheckpointError, match=f"{LINEAR}.{suffix} is missing from llm/model.safe"):
        load(folder)


def test_a_lost_zero_point_is_not_taken_for_symmetric_weights(tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, "compressed-tensors")
    del tensors[f"{LINEAR}.weight_zero_point"]
    as_own_files(folder, tensors)
    with pytest.raises(CheckpointError, match=f"{LINEAR} is of the format compressed-tensors-symm"):
        load(folder)


def test_a_tensor_of_another_format_is_left_over(tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    as_torch_file(folder, {**v2, f"{LINEAR}.qzeros": torch.zeros(1, 1, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=f"{LINEAR}.qzeros in llm/weights.pt is left over"):
        load(folder)


def test_gptq_is_refused_with_what_is_known_instead(tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, "autoawq-gemm")
    tensors[f"{LINEAR}.g_idx"] = torch.zeros(128, dtype=torch.int32)
    as_own_files(folder, tensors)
    with pytest.raises(
        CheckpointError, match=f"{LINEAR} in .* it has .*g_idx.*; known: llm-awq-v2"
    ):
        load(folder)


def test_an_order_of_inputs_is_refused_with_its_layer_and_file(tmp_path: Path) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    tensors = in_format(v2, "compressed-tensors")
    order = torch.zeros(128, dtype=torch.int32)  # one group: the plain order
    as_own_files(folder, {**tensors, f"{LINEAR}.weight_g_idx": order})
    load(folder)
    rewrite_tensors(
        folder / "llm/model.safetensors",
        lambda t: t[f"{LINEAR}.weight_g_idx"].fill_(1),
    )
    with pytest.raises(CheckpointError, match=f"{LINEAR} in llm/model.safetensors: weight_g_idx"):
        load(folder)


# ---- layers that were not quantised ---------------------------------------------------------


def plain(v2: Tensors, name: str, *linears: str) -> Tensors:
    """In another format, but for the named layers, which stay in 16 bits."""
    tensors = in_format(v2, name)
    for linear in linears:
        for key in [key for key in tensors if key.startswith(f"{linear}.")]:
            del tensors[key]
        tensors[f"{linear}.weight"] = torch.ones(128, 128, dtype=torch.float16)
    return tensors


@pytest.mark.parametrize("name", ["autoawq-gemm", "compressed-tensors", "llm-awq-v2"])
def test_layers_that_were_not_converted_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """AutoAWQ's `modules_to_not_convert`, compressed-tensors' `ignore`."""
    folder, v2 = write("vila", tmp_path / "tiny")
    kept = [
        "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj",
        *(f"model.layers.1.self_attn.{part}_proj" for part in "qkv"),
    ]  # fmt: skip
    as_own_files(folder, plain(v2, name, *kept))
    checkpoint = open_checkpoint(folder)
    decoder = load_decoder(
        checkpoint.language, checkpoint.spec.language,
        max_positions=64, device=CPU, dtype=torch.float32, backend="reference",
    )  # fmt: skip
    first, second = decoder.model.layers
    assert isinstance(first.mlp.down_proj, torch.nn.Linear)
    assert bool((first.mlp.down_proj.weight == 1).all())
    assert isinstance(second.self_attn.o_proj, torch.nn.Linear)
    assert second.self_attn.qkv_proj.weight.shape == (3 * 128, 128)
    assert first.self_attn.qkv_proj.backend == second.mlp.down_proj.backend == "reference"


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_layers_that_are_computed_together_must_be_quantised_together(
    part: str, tmp_path: Path
) -> None:
    folder, v2 = write("vila", tmp_path / "tiny")
    layer = f"model.layers.0.self_attn.{part}"
    as_own_files(folder, plain(v2, "compressed-tensors", layer))
    with pytest.raises(CheckpointError, match=f"in 4 bits, and {re.escape(layer)} is not; they"):
        load(folder)


# ---- stale indexes --------------------------------------------------------------------------


@every_layout
def test_a_stale_index_of_16_bit_shards_does_no_harm(layout: str, tmp_path: Path) -> None:
    folder, v2 = write(layout, tmp_path / "tiny")
    as_torch_file(folder, v2)
    index = language_folder(folder) / "model.safetensors.index.json"
    absent = dict.fromkeys(
        [f"{LINEAR}.weight", "lm_head.weight"], "model-00001-of-00002.safetensors"
    )
    index.write_text(json.dumps({"weight_map": absent}))
    for quant_path in (None, language_folder(folder)):
        load(folder, quant_path)


def test_an_indexed_16_bit_checkpoint_and_4_bit_shards_in_one_folder(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", shards=2, hidden=128, intermediate=128)
    v2 = take_awq(folder)
    tensors = in_format(v2, "autoawq-gemm")
    names = sorted(tensors)
    for shard in (1, 2):
        part = {name: tensors[name] for name in names[shard - 1 :: 2]}
        save_file(part, folder / f"awq-0000{shard}-of-00002.safetensors")
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint.language, v2)
    assert checkpoint.projector.file_of("0.weight").startswith("model-0000")
    load(folder)
    load(folder, precision="W16A16")
