"""Files of tensors are read, and never run."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.awq.formats import TensorHeader
from models.checkpoints import open_checkpoint, tensor_files
from models.checkpoints.tensor_files import (
    NotTensors,
    OldTorchFile,
    SafetensorsFile,
    TensorFile,
    TensorStore,
    TorchFile,
    open_folder,
    open_tensor_file,
    open_weight_sets,
)  # fmt: skip
from models.errors import CheckpointError
from tests.checkpoint_files import awq_file, write_tensors
from tests.tiny import write_tiny_llava, write_tiny_vila


class Attack:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


WAYS: dict[str, Callable[[object, Path], object]] = {
    "zip": torch.save,
    "before torch 1.6": lambda value, path: torch.save(
        value, path, _use_new_zipfile_serialization=False
    ),
    "bare pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["alone", "among tensors"])
def test_a_file_that_would_run_a_command_is_refused_and_does_not_run(
    way: str, place: str, tmp_path: Path
) -> None:
    marker, path = tmp_path / "owned", tmp_path / "llava-w4-g128-awq-v2.pt"
    attack = Attack(f"touch {marker}")
    WAYS[way](attack if place == "alone" else {"a": torch.zeros(2), "b": attack}, path)
    with pytest.raises(CheckpointError) as caught:
        open_tensor_file(path, path.name)
    assert not marker.exists()
    assert caught.value.args[0].startswith(path.name) and "refused" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises((AttributeError, EOFError, pickle.UnpicklingError, TypeError, RuntimeError)):
        torch.load(path, weights_only=True)["b"]
    if way == "bare pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the attack itself works, so that the refusal means something"


@pytest.mark.parametrize("name", ["x-awq-v2.pt", "model.safetensors", "pytorch_model.bin"])
def test_a_clone_without_git_lfs_is_told_as_such(name: str, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"^{name} is only Git LFS's pointer .*git lfs pull"):
        open_tensor_file(tmp_path / name, name)


@pytest.mark.parametrize("layout", ["llava", "vila"])
@pytest.mark.parametrize("kind", ["awq", "bin"])
def test_an_attack_inside_a_checkpoint_is_refused(layout: str, kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    write = write_tiny_llava if layout == "llava" else write_tiny_vila
    folder = write(tmp_path / "tiny", file_format="bin")
    path = awq_file(folder) if kind == "awq" else next(folder.rglob("pytorch_model.bin"))
    torch.save({"model.norm.weight": Attack(f"touch {marker}")}, path)
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(folder, precision="W4A16" if kind == "awq" else "W16A16")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "must hold a dict of tensors"),
        ({"a": 3}, "'a' in x.pt is not a dense tensor"),
        ({3: torch.zeros(2)}, "3 in x.pt is not a dense tensor"),
        ({"a": {"b": torch.zeros(2)}}, "'a' in x.pt is not a dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' in x.pt is not a dense tensor"),
    ],
)
def test_only_a_flat_dict_of_dense_tensors_will_do(
    content: object, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(NotTensors, match=message):
        TorchFile(tmp_path / "x.pt", "x.pt")


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_named(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file({"a": torch.zeros(1000)}, path)
    else:
        torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git"}
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError) as caught:
        open_tensor_file(path, "folder/x")
    assert str(caught.value).startswith("folder/x ")
    assert str(tmp_path) not in str(caught.value)
    assert not re.search(r"0x[0-9a-f]{6}", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int16])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "before torch 1.6"])
def test_headers_and_data_come_as_they_were_written(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    value = torch.arange(-6, 6).view(3, 4).to(dtype)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.bin")
    if kind == "safetensors":
        save_file({"a": value}, path)
    else:
        WAYS[kind]({"a": value}, path)
    file = open_tensor_file(path, "x")
    classes = {"safetensors": SafetensorsFile, "zip": TorchFile, "before torch 1.6": OldTorchFile}
    assert type(file) is classes[kind]
    assert file.headers["a"] == ((3, 4), dtype)
    assert torch.equal(file.read("a"), value) and file.read("a").dtype == dtype


KINDS = ["safetensors", "zip", "before torch 1.6"]


def write(kind: str, values: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / ("x.safetensors" if kind == "safetensors" else "x.bin")
    if kind == "safetensors":
        save_file(values, path)
    else:
        WAYS[kind](values, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_were_read_outlive_their_file(kind: str, tmp_path: Path) -> None:
    """A mapped file that is cut under a running process ends it (SIGBUS)."""
    values = {name: torch.arange(1000.0) + 1000 * i for i, name in enumerate("abcde")}
    path = write(kind, values, tmp_path)
    file = open_tensor_file(path, "x")
    read = {name: file.read(name) for name in "edcba"}
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    for name, value in values.items():
        assert torch.equal(read[name], value)
    if kind != "before torch 1.6":
        with pytest.raises(CheckpointError, match="^x ends early"):
            file.read("a")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0)], ids=str)
def test_tensors_are_copied_piece_by_piece_into_any_dtype(
    shape: tuple[int, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", 16)
    values = {"other": torch.arange(9.0), "a": torch.randn(shape)}
    file = open_tensor_file(write(kind, values, tmp_path), "x")
    assert torch.equal(file.read("a"), values["a"])
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.full((4, *shape), 7.0, dtype=dtype)
        file.copy_into("a", rows[1:2].view(shape))
        assert torch.equal(rows[1], values["a"].to(dtype))
        assert (rows[[0, 2, 3]] == 7).all(), "its neighbours are left alone"


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6"])
def test_tensors_that_were_saved_from_a_gpu_are_read_without_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.arange(12.0).view(3, 4)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        path = write(kind, {"a": value}, tmp_path)
    assert b"cuda:1" in path.read_bytes()
    read = open_tensor_file(path, "x").read("a")
    assert read.device.type == "cpu" and torch.equal(read, value)


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6"])
def test_views_are_stored_as_they_are_and_read_in_their_own_order(
    kind: str, tmp_path: Path
) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {
        "rows": whole[1:3], "columns": whole[:, 2:4], "transposed": whole.t(),
        "every second": whole[1::2, ::2], "expanded": whole[0].expand(3, 6),
        "parameter": torch.nn.Parameter(whole[2]),
    }  # fmt: skip
    file = open_tensor_file(write(kind, views, tmp_path), "x")
    for name, view in views.items():
        assert torch.equal(file.read(name), view.detach()), name
        out = torch.empty(view.shape, dtype=torch.float64)
        file.copy_into(name, out)
        assert torch.equal(out, view.detach().double()), name


class MemoryFile(TensorFile):
    def __init__(self, label: str, *names: str) -> None:
        self.path, self.label = Path(label), label
        self.headers = {name: TensorHeader((2,), torch.float32) for name in names}

    def read(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def copy_into(self, name: str, out: torch.Tensor) -> None:
        raise NotImplementedError


def test_a_tensor_in_two_files_is_an_error_that_names_both() -> None:
    with pytest.raises(CheckpointError, match="^b is both in one and in two"):
        TensorStore.of("here", [MemoryFile("one", "a", "b"), MemoryFile("two", "b")])


# ---- folders --------------------------------------------------------------------------------


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def write_index(folder: Path, **places: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {k.replace("_", "."): v for k, v in places.items()}})
    )


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    for file_format in ("bin", "safetensors"):
        folder = tmp_path / file_format
        folder.mkdir()
        write_tensors(folder, tensors("a", "b", "c", "d", "e"), file_format, shards=3)
        store = open_folder(folder, folder)
        assert set(store.files) == set("abcde") and not store.absent
        assert len({file.label for file in store.files.values()}) == 3


def test_safetensors_go_before_the_same_weights_as_bin(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors("a"), "safetensors")
    write_tensors(tmp_path, tensors("a"), "bin")
    assert open_folder(tmp_path, tmp_path).files["a"].label == "model.safetensors"


def test_an_index_whose_files_are_all_there_decides_which_are_read(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors("a", "b"), shards=2)
    save_file(tensors("a", "b"), tmp_path / "consolidated.safetensors")
    store = open_folder(tmp_path, tmp_path)
    assert {file.label for file in store.files.values()} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_a_stale_index_is_not_followed_and_names_what_is_missing(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "model.safetensors")
    write_index(
        tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"
    )
    store = open_folder(tmp_path, tmp_path)
    assert set(store.files) == {"a"}
    assert store.absent["b"] == "model-00002-of-00002.safetensors"


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(tensors("secret"), tmp_path / "outside.safetensors")
    save_file(tensors("a"), inner / "model.safetensors")
    write_index(inner, secret="../outside.safetensors", a="model.safetensors")
    assert set(open_folder(inner, inner).files) == {"a"}


def labels(folder: Path) -> list[list[str]]:
    """The files of each set, sets and files in order."""
    sets = open_weight_sets(folder, folder)
    return sorted(sorted({file.label for file in store.files.values()}) for store in sets)


def test_shards_are_a_set_and_so_is_every_other_file(tmp_path: Path) -> None:
    for name in (
        "model-00001-of-00002",
        "model-00002-of-00002",
        "w4-1-of-2",
        "w4-2-of-2",
        "b",
        "c",
    ):
        save_file(tensors(name), tmp_path / f"{name}.safetensors")
    assert labels(tmp_path) == [
        ["b.safetensors"],
        ["c.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["w4-1-of-2.safetensors", "w4-2-of-2.safetensors"],
    ]
    store = open_folder(tmp_path, tmp_path)
    assert len(store.files) == 6 and store.where == tmp_path.name


def test_beside_an_index_only_4_bit_files_are_sets_of_their_own(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors("a", "b"), shards=2)
    save_file(tensors("a", "b"), tmp_path / "consolidated.safetensors")
    save_file(tensors("a.qweight", "b"), tmp_path / "w4.safetensors")
    own = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert labels(tmp_path) == [own, ["w4.safetensors"]]
    assert set(open_folder(tmp_path, tmp_path).files) == {"a", "b"}


def test_4_bit_files_are_a_folders_own_only_where_there_are_no_others(tmp_path: Path) -> None:
    save_file(tensors("a.weight_packed", "b"), tmp_path / "w4.safetensors")
    assert set(open_folder(tmp_path, tmp_path).files) == {"a.weight_packed", "b"}
    save_file(tensors("c"), tmp_path / "vision.safetensors")
    assert set(open_folder(tmp_path, tmp_path).files) == {"c"}
    sets = open_weight_sets(tmp_path, tmp_path)
    (quantized,) = [store for store in sets if store.holds_quantized]
    assert not open_folder(tmp_path, tmp_path, exclude=quantized).holds_quantized
    (tmp_path / "vision.safetensors").unlink()
    assert not open_folder(tmp_path, tmp_path, exclude=quantized).files


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_a_file_that_is_no_index_is_named(content: str, tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is not an index"):
        open_folder(tmp_path, tmp_path)
