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

from models.awq.formats import QUANTIZED_SUFFIXES
from models.checkpoints.tensor_files import TensorFile, label_of, open_tensor_file
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


def locate(model_path: str | Path, what: str = "model_path") -> Location:
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
    return Location(_from_hub(text, what), text.rpartition("/")[2])


def find_awq_file(
    quant_path: str | Path | None, root: Path, searched: Sequence[Path]
) -> TensorFile | None:
    """The file of the 4-bit weights; None if none is named and none is found.

    Args:
        quant_path: a file, or a folder that holds one; relative to the working directory, or to
            the checkpoint.
        root: the checkpoint.
        searched: the checkpoint's folders that are searched where `quant_path` is None.

    Raises:
        CheckpointError: `quant_path` leads to no 4-bit weights, or there are several candidates.
    """
    if quant_path is None:
        for folder in searched:
            found = _only_awq_file(folder, root)
            if found is not None:
                return found
        return None
    given = Path(quant_path).expanduser()
    for path in (given, root / given):
        if path.is_file():
            file = open_tensor_file(path, label_of(path, root))
            if not _holds_quantized(file):
                raise CheckpointError(f"quant_path {str(quant_path)!r} holds no 4-bit weights")
            return file
        if path.is_dir():
            folder_file = _only_awq_file(path, root)
            if folder_file is None:
                raise CheckpointError(
                    f"quant_path {str(quant_path)!r} is a folder without a .pt file of 4-bit "
                    "weights; name the file, or set precision: W16A16"
                )
            return folder_file
    raise CheckpointError(f"quant_path {str(quant_path)!r} is neither a file nor a folder")


def _only_awq_file(folder: Path, root: Path) -> TensorFile | None:
    """Files named `*-v2.pt` go before others, since older formats may lie beside them."""
    paths = sorted(folder.glob("*.pt"))
    preferred = [path for path in paths if path.name.endswith("-v2.pt")]
    for candidates in (preferred, [path for path in paths if path not in preferred]):
        found = _quantized_among(candidates, root)
        if len(found) > 1:
            names = ", ".join(file.label for file in found)
            raise CheckpointError(
                f"several files hold 4-bit weights: {names}; name one of them as quant_path"
            )
        if found:
            return found[0]
    return None


def _quantized_among(paths: Iterable[Path], root: Path) -> list[TensorFile]:
    files = (open_tensor_file(path, label_of(path, root)) for path in paths if path.is_file())
    return [file for file in files if _holds_quantized(file)]


def _holds_quantized(file: TensorFile) -> bool:
    return any(name.rpartition(".")[2] in QUANTIZED_SUFFIXES for name in file.headers)


def _name_of(folder: Path) -> str:
    """The Hub's cache keeps models in `models--<owner>--<name>/snapshots/<commit>`."""
    if folder.parent.name == "snapshots":
        cached = HUB_SNAPSHOT.fullmatch(folder.parent.parent.name)
        if cached:
            return cached["name"]
    return folder.name


def _from_hub(repository: str, what: str) -> Path:
    incomplete: str | None = None
    try:
        return _download(repository, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        # Some releases of huggingface_hub notice that a cached snapshot lacks files.
        incomplete = getattr(error, "snapshot_path", None)
    try:
        if not HF_HUB_OFFLINE:
            return _download(repository, local_files_only=False)
        reason = "HF_HUB_OFFLINE is set"
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
