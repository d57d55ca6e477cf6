"""What a device can do at most, measured, and what a model would take on it then.

    seconds = max(bytes / bandwidth, operations / peak)

Bytes are those that have to be read at least, once for each step: weights in 4 bits with a 16-bit
scale and a 4-bit zero point for each group, the head in 16 bits, and the KV cache of all streams.
Operations are those of the matrix products. What else a step does (norms, rotations, sampling, the
writing of new keys and values) is left out, so that no implementation can reach the limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from benchmarks.gpu_parts import Case, Figures, Part, Record, Setting
from benchmarks.stopwatch import Stopwatch
from models.checkpoints import ModelSpec
from models.language.kv_cache import KVCacheShape, head_dim
from models.language.loading import linear_shapes
from models.vision.encoder import VisionEncoder

WEIGHT_BITS, SCALE_BITS, ZERO_BITS = 4, 16, 4
HALF = 2
"""Bytes of a value in 16 bits."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Whose products are measured."""


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        copy_bytes_per_s: read and written, of a tensor far larger than any cache.
        read_bytes_per_s: of a sum over it.
        ops_per_s: of square products, by dtype.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    ops_per_s: dict[str, float]

    @classmethod
    def of(cls, setting: Setting) -> Limits:
        """Those that the part "limits" has measured, or measured now where it has not run."""
        path = setting.out / f"{LimitsPart.name}.json"
        figures = Record.read(path).succeeded if path.exists() else {}
        measured = LimitsPart(setting).cases()
        values = {name: figures.get(name) or case() for name, case in measured.items()}
        return cls(
            values["copy"]["value"],
            values["read"]["value"],
            {name: values[name]["value"] for name in DTYPES},
        )

    @property
    def bytes_per_s(self) -> float:
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    @property
    def peak_ops_per_s(self) -> float:
        return max(self.ops_per_s.values())


@dataclass(frozen=True)
class Work:
    """What has to be read and computed."""

    num_bytes: float
    num_ops: float

    def seconds(self, limits: Limits) -> float:
        return max(self.num_bytes / limits.bytes_per_s, self.num_ops / limits.peak_ops_per_s)


@dataclass(frozen=True)
class ModelCost:
    """
    Attributes:
        layer_weights: of all linear layers of the decoder, the head excepted.
        bits_per_weight: of those.
        head_weights: in 16 bits.
        kv_bytes: of one token.
        attention_ops: of one token attending to another, in all layers.
        tower_weights: of the tower's linear layers; every patch goes through all of them.
        tower_attention_ops: of one patch attending to another.
        tower_patches: of one picture.
        projector_weights, projector_rows: every row goes through all of the weights.
    """

    layer_weights: int
    bits_per_weight: float
    head_weights: int
    kv_bytes: float
    attention_ops: int
    tower_weights: int
    tower_attention_ops: int
    tower_patches: int
    projector_weights: int
    projector_rows: int

    @classmethod
    def of(cls, spec: ModelSpec, group_size: int = 128) -> ModelCost:
        language = spec.language
        with torch.device("meta"):
            vision = VisionEncoder(spec.vision, spec.projector)
        tower, patches = spec.vision.config, vision.tower.embeddings.num_positions
        layers = vision.tower.encoder.layers
        quantized = spec.precision == "W4A16"
        return cls(
            layer_weights=sum(n * k for n, k in linear_shapes(language).values()),
            bits_per_weight=WEIGHT_BITS + (SCALE_BITS + ZERO_BITS) / group_size
            if quantized else 8.0 * HALF,
            head_weights=language.vocab_size * language.hidden_size,
            kv_bytes=KVCacheShape.of(language, 1, torch.float16).bytes_per_block,
            attention_ops=_attention_ops(language),
            tower_weights=_linear_weights(layers),
            tower_attention_ops=4 * int(tower.hidden_size) * len(layers),
            tower_patches=int(patches),
            projector_weights=_linear_weights(vision.projector),
            projector_rows=vision.num_tokens_per_tile,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> float:
        """Read by every step, whatever it computes."""
        return self.layer_weights * self.bits_per_weight / 8 + self.head_weights * HALF

    def decode(self, streams: int, context: float) -> Work:
        """One token for each stream, attending to `context` tokens."""
        weights = self.layer_weights + self.head_weights
        return Work(
            self.weight_bytes + streams * context * self.kv_bytes,
            streams * (2 * weights + context * self.attention_ops),
        )

    def first_token(self, prompt_tokens: int, pictures: int) -> tuple[Work, ...]:
        """Tower, projector, and the prompt, one after the other."""
        patches, rows = pictures * self.tower_patches, pictures * self.projector_rows
        causal = prompt_tokens * (prompt_tokens + 1) / 2
        return (
            Work(
                HALF * self.tower_weights,
                patches * (2 * self.tower_weights + self.tower_patches * self.tower_attention_ops),
            ),
            Work(HALF * self.projector_weights, 2 * rows * self.projector_weights),
            Work(
                self.weight_bytes + prompt_tokens * self.kv_bytes,
                2 * (prompt_tokens * self.layer_weights + self.head_weights)
                + causal * self.attention_ops,
            ),
        )

    def first_token_s(self, prompt_tokens: int, pictures: int, limits: Limits) -> float:
        return sum(work.seconds(limits) for work in self.first_token(prompt_tokens, pictures))


def measure_copy(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written ones together."""
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / Stopwatch(device).best(lambda: target.copy_(source))


def measure_read(device: torch.device, num_bytes: int) -> float:
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return data.nbytes / Stopwatch(device).best(data.sum)


def measure_products(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of (size, size) products."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / Stopwatch(device).best(lambda: left @ right)


def _attention_ops(config: PreTrainedConfig) -> int:
    return 4 * config.num_hidden_layers * config.num_attention_heads * head_dim(config)


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class LimitsPart(Part):
    """Bandwidth and peak of the device."""

    name = "limits"
    seconds = 40.0

    def cases(self) -> Mapping[str, Case]:
        device, full = self.setting.device, self.setting.scale == "full"
        num_bytes = 1 << 32 if full else 1 << 26  # far larger than any cache
        size = 8192 if full else 256
        return {
            "copy": lambda: {"value": measure_copy(device, num_bytes)},
            "read": lambda: {"value": measure_read(device, num_bytes)},
            **{
                name: lambda dtype=dtype: {"value": measure_products(device, dtype, size)}
                for name, dtype in DTYPES.items()
            },
        }

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        for name in ("copy", "read"):
            if name in cases:
                yield f"- {name}: {cases[name]['value'] / 1e9:.0f} GB/s"
        for name in DTYPES:
            if name in cases:
                yield f"- {name} products: {cases[name]['value'] / 1e12:.2f} TFLOP/s"
