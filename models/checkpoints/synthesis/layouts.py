"""Where each layout has its tensors, and under which names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from models.checkpoints.synthesis import configs
from models.checkpoints.synthesis.components import (
    Item,
    draw_language,
    draw_newline,
    draw_projector,
    draw_tower,
    language_parameters,
)
from models.checkpoints.synthesis.family import Family
from models.checkpoints.synthesis.files import shard_name
from models.checkpoints.synthesis.formats import OutputFormat
from models.checkpoints.synthesis.tokenizers import WrittenTokenizer
from models.checkpoints.synthesis.tokenizers.base import write_json
from models.checkpoints.synthesis.weights import RandomWeights
from models.errors import ConfigurationError
from models.registry import Registry

Companion: TypeAlias = tuple[Path, Iterable[Item]]


@dataclass(frozen=True)
class Job:
    """One checkpoint to be written.

    Attributes:
        root: its folder.
        formats: that its main files are written in.
        naming: transformers' layout only, a name in `HF_NAMES`.
    """

    family: Family
    root: Path
    formats: tuple[OutputFormat, ...]
    weights: RandomWeights
    group_size: int
    naming: str

    @property
    def quantization(self) -> dict[str, object]:
        """What config.json says about 4-bit weights in the place of the 16-bit ones."""
        settings = [entry.config for entry in self.formats if entry.config is not None]
        return {"quantization_config": settings[0](self.group_size)} if settings else {}


class LayoutWriter(ABC):
    def main_folder(self, job: Job) -> Path:
        """Of the language model and the tokenizer."""
        return job.root

    @abstractmethod
    def write_configs(self, job: Job, tokenizer: WrittenTokenizer) -> None:
        """Every JSON file apart from the tokenizer's."""

    @abstractmethod
    def companions(self, job: Job) -> Iterator[Companion]:
        """Folders that are in 16 bits in every format, with their tensors by stored names."""

    @abstractmethod
    def main(self, job: Job, entry: OutputFormat, vocab_size: int) -> Iterator[Item]:
        """Tensors of the main folder by stored names."""


class LlavaWriter(LayoutWriter):
    def write_configs(self, job: Job, tokenizer: WrittenTokenizer) -> None:
        tower = self._tower_folder(job)
        tower.mkdir(parents=True)
        write_json(tower / "config.json", configs.tower(job.family))
        write_json(tower / "preprocessor_config.json", configs.preprocessor(job.family))
        config = configs.llava(job.family, tokenizer) | job.quantization
        write_json(job.root / "config.json", config)

    def companions(self, job: Job) -> Iterator[Companion]:
        if not job.family.tower_inside:
            items = draw_tower(job.family, job.weights)
            yield self._tower_folder(job), _renamed(items, "vision_model.")

    def main(self, job: Job, entry: OutputFormat, vocab_size: int) -> Iterator[Item]:
        family, weights = job.family, job.weights
        yield from draw_language(family, vocab_size, weights, entry.is_quantized)
        single = family.projector == "linear"  # whose names have no index
        for name, value in draw_projector(family, weights):
            yield f"model.mm_projector.{name.removeprefix('0.') if single else name}", value
        if family.pinpoints:
            yield "model.image_newline", draw_newline(family, weights)
        # llm-awq saves the whole state dict, of which the tower is a part.
        if family.tower_inside or entry.file_ending is not None:
            prefix = "model.vision_tower.vision_tower.vision_model."
            yield from _renamed(draw_tower(family, weights), prefix)

    def _tower_folder(self, job: Job) -> Path:
        return job.root / job.family.tower.name


class VilaWriter(LayoutWriter):
    def main_folder(self, job: Job) -> Path:
        return job.root / "llm"

    def write_configs(self, job: Job, tokenizer: WrittenTokenizer) -> None:
        tower, projector = job.root / "vision_tower", job.root / "mm_projector"
        tower.mkdir()
        projector.mkdir()
        llm = self.main_folder(job)
        write_json(job.root / "config.json", configs.vila(job.family, tokenizer))
        write_json(
            llm / "config.json", configs.vila_language(job.family, tokenizer) | job.quantization
        )
        write_json(tower / "config.json", configs.tower(job.family))
        write_json(tower / "preprocessor_config.json", configs.preprocessor(job.family))
        write_json(projector / "config.json", configs.vila_projector(job.family))
        if all(entry.file_ending is not None for entry in job.formats):
            self._write_stale_index(job, llm, tokenizer.vocab_size)

    def companions(self, job: Job) -> Iterator[Companion]:
        tower = draw_tower(job.family, job.weights)
        yield job.root / "vision_tower", _renamed(tower, "vision_model.")
        projector = draw_projector(job.family, job.weights)
        yield job.root / "mm_projector", _renamed(projector, "layers.")

    def main(self, job: Job, entry: OutputFormat, vocab_size: int) -> Iterator[Item]:
        yield from draw_language(job.family, vocab_size, job.weights, entry.is_quantized)

    def _write_stale_index(self, job: Job, llm: Path, vocab_size: int) -> None:
        """The released AWQ checkpoints have kept the index of the 16-bit files that they lack."""
        absent = shard_name("model", "safetensors", 1, 2)
        names = [parameter.name for parameter in language_parameters(job.family, vocab_size)]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, absent)}
        write_json(llm / "model.safetensors.index.json", index)


class HfWriter(LayoutWriter):
    def write_configs(self, job: Job, tokenizer: WrittenTokenizer) -> None:
        write_json(job.root / "config.json", configs.hf(job.family, tokenizer) | job.quantization)
        write_json(job.root / "preprocessor_config.json", configs.preprocessor(job.family))
        write_json(job.root / "processor_config.json", configs.hf_processor(job.family))
        write_json(job.root / "chat_template.json", configs.hf_chat_template(job.family))

    def companions(self, job: Job) -> Iterator[Companion]:
        yield from ()

    def main(self, job: Job, entry: OutputFormat, vocab_size: int) -> Iterator[Item]:
        family, weights, names = job.family, job.weights, HF_NAMES[job.naming]
        for name, value in draw_language(family, vocab_size, weights, entry.is_quantized):
            yield names.language(name), value
        for name, value in draw_projector(family, weights):
            index, _, kind = name.partition(".")
            number = {"0": 1, "2": 2}[index]
            yield f"{names.prefix}multi_modal_projector.linear_{number}.{kind}", value
        yield from _renamed(draw_tower(family, weights), names.prefix + names.tower)
        if family.pinpoints:
            yield f"{names.prefix}image_newline", draw_newline(family, weights)


@dataclass(frozen=True)
class HfNames:
    """
    Attributes:
        prefix: of projector and tower.
        tower: prefix of the tower's own names, behind that.
        language: a causal language model's name -> the stored one.
    """

    prefix: str
    tower: str
    language: Callable[[str], str]


def _by_module(name: str) -> str:
    """The names of transformers' own modules: the head lies outside of the model."""
    own = name.removeprefix("model.")
    return name if own == name else f"model.language_model.{own}"


HF_NAMES: Registry[HfNames] = Registry("naming of transformers' tensors", ConfigurationError)
HF_NAMES.register(  # as llava-hf's checkpoints were released
    "released", HfNames("", "vision_tower.vision_model.", lambda name: f"language_model.{name}")
)
HF_NAMES.register(  # as transformers 5 saves them again
    "saved", HfNames("", "vision_tower.", lambda name: f"language_model.{name}")
)
HF_NAMES.register(  # as it saves them with `save_original_format=False`
    "modules", HfNames("model.", "vision_tower.", _by_module)
)

LAYOUT_WRITERS: Registry[LayoutWriter] = Registry("layout", ConfigurationError)
LAYOUT_WRITERS.register("llava", LlavaWriter())
LAYOUT_WRITERS.register("vila", VilaWriter())
LAYOUT_WRITERS.register("hf", HfWriter())


def _renamed(items: Iterable[Item], prefix: str) -> Iterator[Item]:
    for name, value in items:
        yield f"{prefix}{name}", value
