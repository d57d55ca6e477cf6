"""The tensors of one component (language model, projector, tower) under its own names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import Tensor

from models.awq.formats import FORMATS, QUANTIZED_SUFFIXES, AwqFormat, TensorHeader, detect
from models.awq.quantized_weight import QuantizedWeight
from models.checkpoints.tensor_files import TensorFile, TensorStore
from models.errors import CheckpointError

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of buffers that old releases saved and that follow from the config."""
LISTED = 10
"""Problems that a message spells out; the rest is counted."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies, and its name there."""

    file: TensorFile
    stored_name: str

    @property
    def header(self) -> TensorHeader:
        return self.file.headers[self.stored_name]

    def read(self) -> Tensor:
        return self.file.read(self.stored_name)


class WeightSource:
    """
    Attributes:
        component: what messages call it: "language model", "projector", "vision tower".
    """

    def __init__(
        self,
        component: str,
        places: Mapping[str, TensorPlace],
        where: str,
        absent: Mapping[str, str] | None = None,
        spellings: Mapping[str, str] | None = None,
        stored_names: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            places: by the component's own names.
            where: the file or folder that a missing tensor should have been in.
            absent: the missing file, for tensors that an index places in it.
            spellings: the ends of names in the file, where they are not the own names.
            stored_names: names in the file, of tensors there and of some that are not.
        """
        self.component = component
        self.where = where
        self._places = {name: place for name, place in places.items() if not name.endswith(DERIVED)}
        self._absent = absent or {}
        self._spellings = spellings or {}
        self._stored_names = stored_names or {}

    @classmethod
    def select(
        cls, component: str, store: TensorStore, own_names: Mapping[str, str]
    ) -> WeightSource:
        """
        Args:
            own_names: names in `store`, of tensors that are there or should be -> the component's
                own names.
        """
        places = {
            own: TensorPlace(store.files[stored], stored)
            for stored, own in own_names.items()
            if stored in store.files
        }
        absent = {
            own: store.absent[stored] for stored, own in own_names.items() if stored in store.absent
        }
        stored_names = {own: stored for stored, own in own_names.items()}
        return cls(component, places, store.where, absent, stored_names=stored_names)

    def renamed(self, new_names: Mapping[str, str]) -> WeightSource:
        """The same tensors; those that `new_names` knows under other names."""
        places = {new_names.get(name, name): place for name, place in self._places.items()}
        absent = {new_names.get(name, name): file for name, file in self._absent.items()}
        spellings = {
            new: old
            for old, new in new_names.items()
            if not new_names.keys().isdisjoint(self._places)
        }
        stored = {new_names.get(name, name): to for name, to in self._stored_names.items()}
        return WeightSource(self.component, places, self.where, absent, spellings, stored)

    def names(self) -> AbstractSet[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header; no data is read."""
        return self._place(name).header.shape

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU and in the file's dtype. Not to be written to."""
        return self._place(name).read()

    def copy_into(self, name: str, out: Tensor) -> None:
        """The tensor's values, without a second copy of it in memory.

        Args:
            out: a row-major tensor or rows of one, of its shape, in any dtype and on any device.
        """
        place = self._place(name)
        place.file.copy_into(place.stored_name, out)

    def file_of(self, name: str) -> str:
        return self._place(name).file.label

    def is_quantized(self, linear: str) -> bool:
        """Whether the layer `linear` ("model.layers.0.mlp.up_proj") is there in 4 bits.

        One that is nowhere counts as such if an index says so.
        """
        suffixes = [f"{linear}.{suffix}" for suffix in QUANTIZED_SUFFIXES]
        if any(name in self._places for name in suffixes):
            return True
        return f"{linear}.weight" not in self._places and bool(self._lost(linear))

    def are_quantized(self, linears: Sequence[str]) -> bool:
        """Whether layers that are to be joined are there in 4 bits.

        Raises:
            CheckpointError: some of them are, and some are not.
        """
        quantized = [linear for linear in linears if self.is_quantized(linear)]
        if 0 < len(quantized) < len(linears):
            others = [linear for linear in linears if linear not in quantized]
            raise CheckpointError(
                f"{self.component}: {', '.join(quantized)} in {self.where} {_are(quantized)} in 4 "
                f"bits, and {', '.join(others)} {_are(others)} not; they are computed together, "
                "so all of them have to be quantised, or none"
            )
        return bool(quantized)

    def quantized_linears(self) -> list[str]:
        """Every layer that is there in 4 bits."""
        split = (name.rpartition(".") for name in self._places)
        return sorted({linear for linear, _, suffix in split if suffix in QUANTIZED_SUFFIXES})

    @property
    def holds_quantized(self) -> bool:
        return bool(self.quantized_linears())

    def format_of(self, linear: str) -> str:
        """The name of its 4-bit format, in `models.awq.formats`.

        Raises:
            CheckpointError: it is of none that is known.
        """
        headers = self._headers(linear)
        name = detect(headers)
        if name is None:
            found = ", ".join(
                f"{suffix} {header.dtype} {header.shape}" for suffix, header in headers.items()
            )
            raise CheckpointError(
                f"{linear} in {self.where} is not of a known 4-bit format: it has "
                f"{found or 'no such tensors'}; known: {', '.join(FORMATS)}"
            )
        return name

    def quantized(self, linear: str) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: the layer is not there in 4 bits, or its tensors are damaged.
        """
        entry = FORMATS[self.format_of(linear)]
        optional = [s for s in entry.optional if f"{linear}.{s}" in self._places]
        tensors = {
            suffix: self.get(f"{linear}.{suffix}") for suffix in (*entry.suffixes, *optional)
        }
        try:
            return entry.unpack(tensors)
        except ValueError as error:
            file = self.file_of(f"{linear}.{entry.suffixes[0]}")
            raise CheckpointError(f"{linear} in {file}: {error}") from error

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        quantized: Mapping[str, tuple[int, int]] | None = None,
        unused: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Strict: every tensor is there, of its shape, and no other. Reads headers only.

        Args:
            expected: shapes of the 16-bit tensors.
            quantized: (N, K) of the layers that must be there in 4 bits.
            unused: tensors that may be there, and are not read.

        Raises:
            CheckpointError: names the tensors and their files, the first ten of them.
        """
        unused = unused or {}
        problems = [
            *self._misfits(expected, required=True),
            *self._misfits(unused, False),
        ]
        known = {*expected, *unused}
        layers = quantized or {}
        formats = {linear: self.format_of(linear) for linear in layers if not self._lost(linear)}
        usual = Counter(formats.values()).most_common(1)
        for linear, (n, k) in layers.items():
            if linear not in formats:
                problems += [self._missing(name) for name in self._lost(linear)]
                known |= {f"{linear}.{suffix}" for suffix in QUANTIZED_SUFFIXES}
                continue
            name, entry = formats[linear], FORMATS[formats[linear]]
            wrong = self._misfit_quantized(linear, entry, n, k)
            if not wrong and name != usual[0][0]:
                # What a lost tensor leaves may well be of another format: symmetric, say.
                wrong = [f"{linear} is of the format {name}, where most layers are {usual[0][0]}"]
            problems += wrong
            known |= {f"{linear}.{suffix}" for suffix in (*entry.suffixes, *entry.optional)}
        problems += [
            f"{self._stored(name)} in {self.file_of(name)} is left over: "
            "the model has no such tensor"
            for name in sorted(self._places.keys() - known)
        ]
        self._raise(problems)

    def _lost(self, linear: str) -> list[str]:
        """A layer's 4-bit tensors that an index places in a file which is absent."""
        names = (f"{linear}.{suffix}" for suffix in sorted(QUANTIZED_SUFFIXES))
        return [name for name in names if name in self._absent and name not in self._places]

    def _misfits(self, shapes: Mapping[str, tuple[int, ...]], required: bool) -> Iterable[str]:
        for name, shape in shapes.items():
            if name not in self._places:
                if required:
                    yield self._missing(name)
            elif self.shape(name) != shape:
                yield (
                    f"{self._stored(name)} in {self.file_of(name)} has shape {self.shape(name)}, "
                    f"expected {shape}"
                )

    def _misfit_quantized(self, linear: str, entry: AwqFormat, n: int, k: int) -> Collection[str]:
        headers = self._headers(linear)
        missing = [suffix for suffix in entry.suffixes if suffix not in headers]
        if missing:
            return [self._missing(f"{linear}.{suffix}") for suffix in missing]
        problem = entry.problem(headers, n, k)
        if problem is None:
            return []
        name = f"{linear}.{problem[0]}"
        return [f"{self._stored(name)} in {self.file_of(name)} {problem[1]}"]

    def _missing(self, name: str) -> str:
        stored = self._stored(name)
        if name in self._absent:
            file = self._absent[name]
            return f"{stored} is missing: the index places it in {file}, which is absent"
        return f"{stored} is missing from {self.where}"

    def _stored(self, name: str) -> str:
        """The name in the file; of a missing tensor, what it should be, by its siblings'."""
        if name in self._stored_names:
            return self._stored_names[name]
        for own, place in self._places.items():
            ending = self._spellings.get(own, own)
            if place.stored_name.endswith(ending):
                prefix = place.stored_name.removesuffix(ending)
                return f"{prefix}{self._spellings.get(name, name)}"
        return name

    def _raise(self, problems: Collection[str]) -> None:
        if not problems:
            return
        listed = "; ".join([*problems][:LISTED])
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(f"{self.component}: {listed}{more}")

    def _headers(self, linear: str) -> dict[str, TensorHeader]:
        prefix = f"{linear}."
        return {
            name.removeprefix(prefix): place.header
            for name, place in self._places.items()
            if name.startswith(prefix)
        }

    def _place(self, name: str) -> TensorPlace:
        if name not in self._places:
            raise CheckpointError(f"{self.component}: {self._missing(name)}")
        return self._places[name]


def _are(linears: Sequence[str]) -> str:
    return "is" if len(linears) == 1 else "are"
