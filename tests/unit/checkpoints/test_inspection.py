"""What `inspect` says of a checkpoint: against its files, and against what loading says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from models import load_engine
from models.checkpoints import locations, tensor_files
from models.checkpoints.__main__ import main
from models.checkpoints.inspection import inspect_checkpoint, render
from models.checkpoints.synthesis import FAMILIES, OUTPUT_FORMATS, synthesize
from models.checkpoints.synthesis.synthesize import GROUP_SIZES
from models.errors import CheckpointError
from tests.checkpoint_files import awq_file, rewrite_json, rewrite_tensors


@pytest.fixture
def vila(tmp_path: Path) -> Path:
    (folder,) = synthesize("vila1.5-3b", tmp_path / "vila1.5-3b")
    return folder


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    (folder,) = synthesize("llava-v1.6-vicuna-7b", tmp_path / "llava-v1.6-vicuna-7b")
    return folder


def test_damaged_4_bit_weights_are_named_where_16_bit_ones_are_served(vila: Path) -> None:
    assert inspect_checkpoint(vila).sections["checkpoint"]["not served as"] == {}
    damaged = awq_file(vila)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    found = inspect_checkpoint(vila)
    assert found.sections["checkpoint"]["precision"] == "W16A16"
    assert "not as W4A16: " in render(found) and damaged.name in render(found)


def test_it_says_what_the_folder_holds(vila: Path) -> None:
    found = inspect_checkpoint(vila).sections
    assert found["checkpoint"] == {
        "layout": "vila",
        "precision": "W4A16",
        "path": str(vila),
        "not served as": {},
    }
    language = found["language model"]
    assert (language["family"], language["layers"], language["vocabulary"]) == ("llama", 2, 400)
    assert (found["vision tower"]["kind"], found["vision tower"]["image size"]) == ("siglip", 28)
    assert found["projector"]["kind"] == "mlp_downsample"
    assert found["projector"]["token order"] == "column"
    assert found["preprocessing"]["mode"] == "resize"
    assert found["preprocessing"]["tokens per picture"] == 16
    assert found["prompts"]["template"] == "vicuna_v1"
    assert found["prompts"]["stop tokens"] == ["</s>"]
    assert found["prompts"]["tokenizer"] == "SentencePiece"
    assert found["files"] == {
        "language model": ["llm/vila1.5-3b-w4-g128-awq-v2.pt"],
        "projector": ["mm_projector/model.safetensors"],
        "vision tower": ["vision_tower/model.safetensors"],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described(family: str, tmp_path: Path) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"])
    inspection = inspect_checkpoint(folder)
    text = render(inspection)
    assert inspection.sections["checkpoint"]["precision"] == "W16A16"
    assert text.splitlines()[0] == family
    starts = {line[: line.index(line.strip())] for line in text.splitlines()[1:]}
    assert len(starts) == 2, "names in one column, what they say in another"


@pytest.mark.parametrize("name", [name for name in OUTPUT_FORMATS if name != "16bit"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_formats_and_group_sizes(name: str, group_size: int, tmp_path: Path) -> None:
    (folder,) = synthesize(
        "nvila-8b-resize", tmp_path / "nvila", formats=[name], group_size=group_size
    )
    expected = {"llm-awq-v0": "autoawq-gemm", "autoawq": "autoawq-gemm"}
    expected["compressed-tensors-sym"] = "compressed-tensors-symmetric"
    found = inspect_checkpoint(folder).sections["quantisation"]
    assert found == {"format": expected.get(name, name), "group size": group_size}


def test_tiles_count_with_their_newlines(llava: Path) -> None:
    """One tile of 4 x 4; at most 2 x 2 tiles more, which are 8 rows with a newline each."""
    found = inspect_checkpoint(llava).sections["preprocessing"]
    assert found["tokens per picture"] == 16 + 64 + 8
    assert "up to 88 tokens per picture" in render(inspect_checkpoint(llava))


def test_memory_is_that_of_the_tensors_that_are_used(vila: Path) -> None:
    found = inspect_checkpoint(vila, context=100, concurrency=3).sections["memory"]
    counts = {
        f"{part}.{name}": value.numel()
        for part in ("llm", "mm_projector", "vision_tower")
        for name, value in load_file(vila / part / "model.safetensors").items()
    }
    unused = (".layers.2.", "post_layernorm", ".head.")
    used = sum(
        count
        for name, count in counts.items()
        if not (name.startswith("vision_tower.") and any(part in name for part in unused))
    )
    assert found["weights in bytes"]["W16A16"] == 2 * used
    assert found["weights in bytes"]["W4A16"] < found["weights in bytes"]["W16A16"] / 2
    # Seven blocks of 16 tokens; keys and values of 2 layers of 4 heads of 64, two bytes each.
    assert found["KV cache in bytes"] == 3 * 7 * 16 * 2 * 2 * 4 * 64 * 2


@pytest.mark.parametrize("precision", ["W4A16", "W16A16"])
def test_no_weights_are_read(precision: Any, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of one 4-bit layer, which alone say how large its groups are."""
    read: list[str] = []
    for method in ("read", "copy_into"):
        original = getattr(tensor_files.MappableFile, method)
        monkeypatch.setattr(tensor_files.MappableFile, method, _recording(original, read))
    inspect_checkpoint(llava, precision=precision)
    assert len({name.rpartition(".")[0] for name in read}) == (1 if precision == "W4A16" else 0)


# ---- what cannot be served --------------------------------------------------------------------


def _without_a_norm(folder: Path) -> None:
    rewrite_tensors(
        folder / "llm" / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight")
    )


def _misshapen_projector(folder: Path) -> None:
    rewrite_tensors(
        folder / "mm_projector" / "model.safetensors",
        lambda tensors: tensors.update({"layers.2.weight": torch.zeros(3, 256)}),
    )


def _without_tower(folder: Path) -> None:
    (folder / "vision_tower" / "model.safetensors").unlink()


def _unknown_projector(folder: Path) -> None:
    rewrite_json(folder / "mm_projector" / "config.json", mm_projector_type="resampler")


def _tiling(folder: Path) -> None:
    rewrite_json(folder / "config.json", image_aspect_ratio="dynamic")


def _small_vocabulary(folder: Path) -> None:
    """A tokenizer of another model."""
    config = {"added_tokens_decoder": {"403": {"content": "<new>", "special": True}}}
    rewrite_json(folder / "llm" / "tokenizer_config.json", **config)


@pytest.mark.parametrize(
    "damage",
    [_without_a_norm, _misshapen_projector, _without_tower, _unknown_projector, _tiling,
     _small_vocabulary],
)  # fmt: skip
def test_the_reason_is_the_one_that_loading_gives(
    damage: Callable[[Path], None], vila: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(vila)
    with pytest.raises(CheckpointError) as loading:
        load_engine(vila, precision="W16A16", device="cpu")
    assert main(["inspect", str(vila), "--precision", "W16A16"]) == 1
    assert capsys.readouterr().err == f"{vila} cannot be served: {loading.value}\n"


def test_without_any_language_model_both_reasons_are_given(tmp_path: Path) -> None:
    (folder,) = synthesize("vila1.5-3b", tmp_path / "vila1.5-3b", formats=["llm-awq-v2"])
    next((folder / "llm").glob("*.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"as W4A16: .* as W16A16: "):
        inspect_checkpoint(folder)


def test_machines_are_told_too(vila: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(vila), "--json", "--context", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["servable"], found["memory"]["context"]) == (True, 64)
    _unknown_projector(vila)
    assert main(["inspect", str(vila), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["servable"] is False and "resampler" in found["reason"]


def test_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def download(repository: str, local_files_only: bool) -> Path:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(locations, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locations, "_download", download)
    assert main(["inspect", "someone/model"]) == 1
    assert asked and all(asked)
    assert "local Hugging Face cache" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--context", "0"], ["--concurrency", "many"]])
def test_wrong_numbers_are_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "folder", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and arguments[0] in error


def _recording(read: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def recorded(file: tensor_files.TensorFile, name: str, *out: torch.Tensor) -> Any:
        names.append(name)
        return read(file, name, *out)

    return recorded
