"""What a layout does: say whether a folder is of its kind, and open it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.checkpoints.locations import Location, find_awq
from models.checkpoints.spec import Checkpoint, PatchMerge, Precision, TokenOrder
from models.checkpoints.tensor_files import TensorStore
from models.checkpoints.weight_source import WeightSource
from models.errors import CheckpointError
from models.json_config import JsonConfig


@dataclass(frozen=True)
class Request:
    """What `open_checkpoint` was asked for.

    Attributes:
        config: the folder's config.json.
        template: instead of the one that the name suggests.
        token_order: instead of the one of the checkpoint's era.
        may_download: from the Hub, what is in no folder and not in the local cache.
    """

    location: Location
    config: JsonConfig
    quant_path: str | Path | None
    precision: Precision
    template: str | None
    token_order: TokenOrder | None
    may_download: bool


class Layout(ABC):
    @abstractmethod
    def matches(self, root: Path, config: JsonConfig) -> bool:
        """Whether the folder is of this layout."""

    @abstractmethod
    def open(self, request: Request) -> Checkpoint:
        """
        Raises:
            CheckpointError: the folder cannot be served; says which file or key, and why.
        """


def find_awq_store(request: Request, searched: Sequence[Path]) -> TensorStore | None:
    """The AWQ files' tensors; None for 16-bit models, or where there are no such files."""
    if request.precision == "W16A16":
        return None
    return find_awq(request.quant_path, request.location.root, searched)


def check_precision(source: WeightSource, request: Request, searched: Sequence[str]) -> None:
    """Whether the language model is there in the precision that was asked for."""
    if request.precision == "W4A16" and not source.holds_quantized:
        raise CheckpointError(
            f"precision is W4A16, but there are no 4-bit weights: no .pt file with such in "
            f"{' or '.join(searched)}, nor in the checkpoint's own files. Give the file as "
            "quant_path, or set precision: W16A16"
        )
    if request.precision == "W16A16" and source.holds_quantized:
        raise CheckpointError(
            f"precision is W16A16, but the language model in {source.where} is in 4 bits; set "
            "precision: W4A16"
        )
    if not source.names():
        raise CheckpointError(
            f"precision is {request.precision}, but there are no 16-bit weights of the language "
            f"model in {source.where}; add them, or set precision: W4A16 if the checkpoint is "
            "an AWQ one"
        )


def names_in(store: TensorStore) -> list[str]:
    """Of all tensors that are there, and of those that only an index promises."""
    return [*store.files, *(name for name in store.absent if name not in store.files)]


def select_projector(
    stores: Iterable[TensorStore | None],
    merge: PatchMerge,
    pattern: re.Pattern[str],
    newline: re.Pattern[str],
    newline_name: str,
) -> WeightSource:
    """The projector's tensors, and the one behind each row of tiles where `merge` asks for it.

    Args:
        pattern, newline: see `select_first`.
        newline_name: of that one in the store.
    """
    if merge != "spatial_unpad":
        return select_first(stores, "projector", pattern)
    return select_first(stores, "projector", pattern, newline, expected=(newline_name,))


def select_first(
    stores: Iterable[TensorStore | None],
    component: str,
    *patterns: re.Pattern[str],
    expected: Sequence[str] = (),
) -> WeightSource:
    """A component's tensors, from the first store that has any of them.

    Args:
        patterns: of whole names in a store; their group `own` is the component's own name.
        expected: a name in the store, of a tensor whose name does not begin as its siblings' do;
            should it be missing, messages name it so.
    """
    found = WeightSource(component, {}, "the checkpoint")
    for store in stores:
        if store is None:
            continue
        names = [*expected, *names_in(store)]
        own_names = {
            name: match["own"]
            for pattern in patterns
            for name in names
            if (match := pattern.fullmatch(name))
        }
        found = WeightSource.select(component, store, own_names)
        if found.names():
            return found
    return found
