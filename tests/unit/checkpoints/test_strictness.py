"""Every tensor there, of the right shape, and none besides; whatever is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from models.checkpoints import Checkpoint, open_checkpoint
from models.checkpoints.spec import Precision
from models.errors import CheckpointError
from models.language.loading import load_decoder
from models.vision import load_vision
from tests.checkpoint_files import (
    Tensors,
    awq_file,
    read_tensors,
    rewrite_json,
    rewrite_tensors,
    write_tensors,
)
from tests.parity.hf import Spelling, respell, text_configs, write_hf
from tests.tiny import write_tiny_llava, write_tiny_vila

CPU = torch.device("cpu")
TOWER = "model.vision_tower.vision_tower.vision_model."


def load(folder: Path, precision: Precision) -> None:
    """All that `load_engine` reads of a checkpoint's tensors."""
    checkpoint = open_checkpoint(folder, precision=precision)
    load_vision(checkpoint, CPU, torch.float32)
    load_decoder_of(checkpoint)


def load_decoder_of(checkpoint: Checkpoint) -> None:
    load_decoder(
        checkpoint.language, checkpoint.spec.language,
        max_positions=64, device=CPU, dtype=torch.float32, backend="reference",
    )  # fmt: skip


class Case(NamedTuple):
    """One tensor of one kind of checkpoint. `file` is as messages name it, "*.pt" the AWQ file."""

    layout: str
    precision: Precision
    file: str
    tensor: str


CASES = [
    Case("llava", "W16A16", "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    Case("llava", "W16A16", "model.safetensors", "lm_head.weight"),
    Case("llava", "W16A16", "model.safetensors", "model.mm_projector.2.bias"),
    Case("llava", "W16A16", "model.safetensors", f"{TOWER}encoder.layers.1.mlp.fc1.weight"),
    Case("llava", "W16A16", "model.safetensors", f"{TOWER}embeddings.class_embedding"),
    Case("llava", "W4A16", "model.safetensors", "model.mm_projector.0.weight"),
    Case("llava", "W4A16", "*.pt", "model.layers.0.self_attn.q_proj.qweight"),
    Case("llava", "W4A16", "*.pt", "model.layers.1.mlp.down_proj.scales"),
    Case("llava", "W4A16", "*.pt", "model.layers.1.self_attn.o_proj.scaled_zeros"),
    Case("llava", "W4A16", "*.pt", "model.layers.1.input_layernorm.weight"),
    Case("llava", "W4A16", "*.pt", "model.embed_tokens.weight"),
    Case("hf old", "W16A16", "model.safetensors",
         "language_model.model.layers.1.mlp.up_proj.weight"),
    Case("hf old", "W16A16", "model.safetensors", "language_model.lm_head.weight"),
    Case("hf old", "W16A16", "model.safetensors",
         "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"),
    Case("hf old", "W16A16", "model.safetensors", "multi_modal_projector.linear_2.bias"),
    Case("hf new", "W16A16", "model.safetensors",
         "model.language_model.layers.0.self_attn.q_proj.bias"),
    Case("hf new", "W16A16", "model.safetensors", "model.language_model.norm.weight"),
    Case("hf new", "W16A16", "model.safetensors", "lm_head.weight"),
    Case("hf new", "W16A16", "model.safetensors", "model.multi_modal_projector.linear_1.weight"),
    Case("vila", "W16A16", "llm/model.safetensors", "model.norm.weight"),
    Case("vila", "W16A16", "mm_projector/model.safetensors", "layers.4.weight"),
    Case("vila", "W16A16", "vision_tower/model.safetensors",
         "vision_model.embeddings.position_embedding.weight"),
    Case("vila", "W4A16", "*.pt", "model.layers.0.mlp.gate_proj.qweight"),
    Case("vila", "W4A16", "*.pt", "model.layers.0.post_attention_layernorm.weight"),
    Case("vila", "W4A16", "mm_projector/model.safetensors", "layers.1.bias"),
]  # fmt: skip
every_tensor = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.precision}-{c.tensor}")


def write(case: Case, parent: Path) -> tuple[Path, Path, str]:
    """The checkpoint, the case's file in it, and that file's name in messages."""
    folder = parent / "tiny"
    if case.layout == "llava":
        write_tiny_llava(folder, hidden=128, intermediate=128)
    elif case.layout.startswith("hf"):
        write_hf(folder, text_configs()["qwen2"])
        respell(folder, "old" if case.layout == "hf old" else "new")
    else:
        write_tiny_vila(folder, hidden=128, intermediate=128)
    path = awq_file(folder) if case.file == "*.pt" else folder / case.file
    return folder, path, str(path.relative_to(folder))


@every_tensor
def test_a_missing_tensor_is_named_with_its_file(case: Case, tmp_path: Path) -> None:
    folder, path, label = write(case, tmp_path)
    load(folder, case.precision)
    rewrite_tensors(path, lambda tensors: tensors.pop(case.tensor))
    with pytest.raises(CheckpointError) as caught:
        load(folder, case.precision)
    assert f"{case.tensor} is missing from {label}" in str(caught.value)


@every_tensor
def test_a_misshaped_tensor_is_named_with_its_file(case: Case, tmp_path: Path) -> None:
    folder, path, label = write(case, tmp_path)
    right: list[int] = []

    def grow(tensors: Tensors) -> None:
        right.extend(tensors[case.tensor].shape)
        tensors[case.tensor] = torch.cat([tensors[case.tensor], tensors[case.tensor][:1]])

    rewrite_tensors(path, grow)
    with pytest.raises(CheckpointError) as caught:
        load(folder, case.precision)
    wrong = (right[0] + 1, *right[1:])
    message = str(caught.value)
    assert f"{case.tensor} in {label} has shape {wrong}" in message
    assert str(tuple(right)) in message


@every_tensor
def test_a_tensor_too_many_is_named_with_its_file(case: Case, tmp_path: Path) -> None:
    folder, path, label = write(case, tmp_path)
    parent, _, suffix = case.tensor.rpartition(".")
    extra = f"{parent}.more_{suffix}"
    rewrite_tensors(path, lambda tensors: tensors.update({extra: torch.zeros(3)}))
    with pytest.raises(CheckpointError) as caught:
        load(folder, case.precision)
    assert f"{extra} in {label} is left over" in str(caught.value)


@pytest.mark.parametrize("layout", ["llava", "vila"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_shard_that_is_absent_is_named_with_its_tensors(
    layout: str, file_format: str, tmp_path: Path
) -> None:
    write = write_tiny_llava if layout == "llava" else write_tiny_vila
    folder = write(tmp_path / "tiny", file_format=file_format, shards=4)
    load(folder, "W16A16")
    (shard,) = folder.rglob(f"*-00002-of-00004.{file_format}")
    lost = set(read_tensors(shard))
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        load(folder, "W16A16")
    message = str(caught.value)
    assert f"is missing: the index places it in {shard.name}, which is absent" in message
    assert any(f"{name} is missing: the index" in message for name in lost)
    if layout == "vila":  # its 4-bit weights are elsewhere, and the index is stale
        load(folder, "W4A16")


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_an_absent_shard_of_transformers_layout_is_named_with_its_tensors(
    spelling: Spelling, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    write_hf(folder, text_configs()["mistral"])
    respell(folder, spelling)
    whole = folder / "model.safetensors"
    write_tensors(folder, read_tensors(whole), shards=4)
    whole.unlink()
    load(folder, "W16A16")
    shard = folder / "model-00002-of-00004.safetensors"
    lost = set(read_tensors(shard))
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_decoder_of(open_checkpoint(folder, precision="W16A16"))
    found = re.findall(rf"(\S+) is missing: the index places it in {shard.name}", str(caught.value))
    assert found and set(found) <= lost


def test_a_layer_too_many_is_left_over_and_one_too_few_is_missing(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.\S+ in tiny\S+\.pt is left over"):
        load(folder, "W4A16")
    rewrite_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+ is missing from model\."):
        load(folder, "W16A16")


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", layers=3)
    rewrite_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="; and 8 more$") as caught:
        load(folder, "W16A16")
    assert str(caught.value).count("left over") == 10


def test_both_bias_tensors_of_a_linear_projector_have_their_own_names(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", projector="linear")
    rewrite_tensors(folder / "model.safetensors", lambda t: t.pop("model.mm_projector.bias"))
    with pytest.raises(CheckpointError, match=r"projector: model\.mm_projector\.bias is missing"):
        load(folder, "W16A16")


@pytest.mark.parametrize("component", ["model.mm_projector.", "model.vision_tower."])
def test_a_component_that_is_missing_altogether_is_named(component: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(component)]:
            del tensors[name]

    rewrite_tensors(folder / "model.safetensors", drop)
    name = {"model.mm_projector.": "projector", "model.vision_tower.": "vision tower"}[component]
    with pytest.raises(CheckpointError, match=f"^{name}: .* is missing from"):
        load(folder, "W16A16")


def test_buffers_that_follow_from_the_config_are_passed_over(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    rewrite_tensors(folder / "model.safetensors", lambda tensors: tensors.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32),
        f"{TOWER}embeddings.position_ids": torch.arange(17)[None],
    }))  # fmt: skip
    load(folder, "W16A16")


@pytest.mark.parametrize("layout", ["llava", "vila", "hf"])
def test_a_file_that_was_cut_short_is_named(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    if layout == "hf":
        write_hf(folder, text_configs()["llama"])
    else:
        (write_tiny_llava if layout == "llava" else write_tiny_vila)(folder)
    (path,) = folder.glob("**/llm/*.safetensors" if layout == "vila" else "*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    label = str(path.relative_to(folder))
    with pytest.raises(CheckpointError, match=f"^{label} is not a readable safetensors file"):
        load(folder, "W16A16")


@pytest.mark.parametrize("suffix", ["qweight", "scales", "scaled_zeros"])
def test_a_layer_in_4_bits_that_lost_a_tensor_names_it(suffix: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    name = f"model.layers.1.mlp.down_proj.{suffix}"
    rewrite_tensors(awq_file(folder), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name} is missing from \S+\.pt"):
        load(folder, "W4A16")


def test_damaged_zero_points_name_the_layer_and_the_file(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    linear = "model.layers.1.mlp.up_proj"
    rewrite_tensors(awq_file(folder), lambda tensors: tensors[f"{linear}.scaled_zeros"].mul_(0.97))
    with pytest.raises(CheckpointError, match=rf"{linear} in \S+\.pt: scaled_zeros are not"):
        load(folder, "W4A16")


def test_fused_layers_of_several_group_sizes_are_named(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", hidden=512, heads=8)
    other = write_tiny_llava(tmp_path / "other", hidden=512, heads=8, group_size=64)
    donor = torch.load(awq_file(other), weights_only=True)
    name = "model.layers.0.self_attn.k_proj."
    rewrite_tensors(
        awq_file(folder),
        lambda tensors: tensors.update({k: v for k, v in donor.items() if k.startswith(name)}),
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.qkv_proj"):
        load(folder, "W4A16")
