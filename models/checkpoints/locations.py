"""Where a model's files are: folders, Hub ids, and the AWQ file among them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from models.checkpoints.tensor_files import (
    SHARD,
    NotTensors,
    TensorFile,
    TensorStore,
    label_of,
    open_tensor_file,
    open_weight_sets,
)
from models.errors import CheckpointError
from models.hub import HUB_ID

logger = logging.getLogger(__name__)

HUB_SNAPSHOT = re.compile(r"models--.+?--(?P<name>[^/\\]+)")
NOT_NEEDED = [
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.md",
    "*.jpg",
    "*.png",
    "*.mp4",
    "*.py",
]


@dataclass(frozen=True)
class Location:
    """A model's folder, and its name: the folder's, or the last part of its Hub id."""

    root: Path
    name: str


def locate(
    model_path: str | Path, what: str = "model_path", *, may_download: bool = True
) -> Location:
    """A folder as it is; a Hub id from the local cache, else from the Hub.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return Location(folder.absolute(), _name_of(folder.absolute()))
    text = str(model_path)
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"{what} {text!r} is no folder, nor of the form of a Hub id (owner/name)"
        )
    return Location(_from_hub(text, what, may_download), text.rpartition("/")[2])


def find_awq(
    quant_path: str | Path | None, root: Path, searched: Sequence[Path]
) -> TensorStore | None:
    """The 4-bit weights; None if none are named and none are found.

    They are one `.pt` file, a folder of `.pt` files with one tensor each (which TinyChat calls
    `mem_efficient_load`), or safetensors, sharded or not, which may be the checkpoint's own.

    Args:
        quant_path: a file (one shard of several stands for all), or a folder that holds them;
            relative to the working directory, or to the checkpoint.
        root: the checkpoint.
        searched: the checkpoint's folders that are searched where `quant_path` is None.

    Raises:
        CheckpointError: `quant_path` leads to no 4-bit weights, or there are several candidates.
    """
    if quant_path is None:
        for folder in searched:
            found = _awq_in(folder, root)
            if found is not None:
                return found
        return None
    given = Path(quant_path).expanduser()
    for path in (given, root / given):
        if path.is_file():
            store = _store_of(path, root)
            if not store.holds_quantized:
                raise CheckpointError(f"quant_path {str(quant_path)!r} holds no 4-bit weights")
            return store
        if path.is_dir():
            # TinyChat's users name `llm/`, or the checkpoint that it lies in.
            found = _awq_in(path, root) or _awq_in(path / "llm", root)
            if found is None:
                raise CheckpointError(
                    f"quant_path {str(quant_path)!r} is a folder without a .pt file of 4-bit "
                    "weights or safetensors of such; name the file, or set precision: W16A16"
                )
            return found
    raise CheckpointError(f"quant_path {str(quant_path)!r} is neither a file nor a folder")


def _store_of(path: Path, root: Path) -> TensorStore:
    if SHARD.fullmatch(path.stem):
        for store in open_weight_sets(path.parent, root):
            if path in store.paths:
                return store
    file = open_tensor_file(path, label_of(path, root))
    return TensorStore.of(file.label, [file])


def _awq_in(folder: Path, root: Path) -> TensorStore | None:
    """Files named `*-v2.pt` go before others, since older formats may lie beside them."""
    paths = sorted(path for path in folder.glob("*.pt") if path.is_file())
    newest = [path for path in paths if path.name.endswith("-v2.pt")]
    found = [store for store in _torch_stores(newest, folder, root) if store.holds_quantized]
    if not found:
        rest = [path for path in paths if path not in newest]
        stores = [*_torch_stores(rest, folder, root), *open_weight_sets(folder, root)]
        found = [store for store in stores if store.holds_quantized]
    if len(found) > 1:
        names = ", ".join(_described(store) for store in found)
        raise CheckpointError(
            f"several files hold 4-bit weights: {names}; name one of them as quant_path"
        )
    return found[0] if found else None


def _torch_stores(paths: Iterable[Path], folder: Path, root: Path) -> list[TensorStore]:
    """Each file by itself, but those that hold one tensor each, by its name, together."""
    alone: list[TensorFile] = []
    split: list[TensorFile] = []
    for path in paths:
        try:
            file = open_tensor_file(path, label_of(path, root))
        except NotTensors:
            continue  # a trainer's state, or the results of AWQ's search
        (split if [*file.headers] == [path.stem] else alone).append(file)
    stores = [TensorStore.of(file.label, [file]) for file in alone]
    if split:
        stores.append(TensorStore.of(label_of(folder, root), split))
    return stores


def _described(store: TensorStore) -> str:
    """A file by its name; shards by their first."""
    return min(file.label for file in store.files.values())


def _name_of(folder: Path) -> str:
    """The Hub's cache keeps models in `models--<owner>--<name>/snapshots/<commit>`."""
    if folder.parent.name == "snapshots":
        cached = HUB_SNAPSHOT.fullmatch(folder.parent.parent.name)
        if cached:
            return cached["name"]
    return folder.name


def _from_hub(repository: str, what: str, may_download: bool) -> Path:
    incomplete: str | None = None
    try:
        return _download(repository, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        # Some releases of huggingface_hub notice that a cached snapshot lacks files.
        incomplete = getattr(error, "snapshot_path", None)
    try:
        if may_download and not HF_HUB_OFFLINE:
            return _download(repository, local_files_only=False)
        reason = "HF_HUB_OFFLINE is set" if may_download else "nothing is downloaded here"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"the Hub gave none ({type(error).__name__})"
    if incomplete is not None:
        logger.warning("%s is only partly in the local cache, and %s", repository, reason)
        return Path(incomplete)
    raise CheckpointError(
        f"{what} {repository!r} is no folder, is not in the local Hugging Face cache, and "
        f"{reason}; give a folder, or download the model first"
    )


def _download(repository: str, local_files_only: bool) -> Path:
    return Path(
        snapshot_download(repository, local_files_only=local_files_only, ignore_patterns=NOT_NEEDED)
    )
