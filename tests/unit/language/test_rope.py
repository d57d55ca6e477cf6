"""Rotary angles are transformers', for every kind of scaling that a config may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.errors import CheckpointError
from models.language.rope import RotaryEmbedding, rotate

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "another theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def config(kind: str, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256,
        rope_parameters=dict(KINDS[kind]), **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 32])
def test_the_table_is_transformers(kind: str, head_dim: int) -> None:
    settings = config(kind, head_dim=head_dim)
    positions = torch.arange(256)
    cos, sin = LlamaRotaryEmbedding(settings)(torch.zeros(1, 1), positions[None])
    got = RotaryEmbedding(settings, 256, CPU).at(positions, torch.float32)
    assert torch.allclose(got[0][:, 0], cos[0], atol=1e-5)
    assert torch.allclose(got[1][:, 0], sin[0], atol=1e-5)


def test_the_kinds_differ() -> None:
    """All but dynamic, which is the default up to the pretrained length."""
    tables = {kind: RotaryEmbedding(config(kind), 256, CPU).cos for kind in KINDS}
    for kind, table in tables.items():
        same = {other for other in tables if torch.allclose(tables[other], table, atol=1e-4)}
        assert same == ({"default", "dynamic"} if kind in {"default", "dynamic"} else {kind})


def test_rotating_is_transformers_rotation() -> None:
    rotary = RotaryEmbedding(config("default"), 256, CPU)
    positions = torch.tensor([7, 0, 255, 8])
    q, k = torch.randn(4, 3, 16), torch.randn(4, 1, 16)
    cos, sin = rotary.at(positions, torch.float32)
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[:, 0][None], sin[:, 0][None]
    )
    for x, turned in zip((q, k), expected, strict=True):
        assert torch.allclose(rotate(x, cos, sin), turned[0].transpose(0, 1), atol=1e-6)


def test_tables_are_rounded_to_the_models_dtype_and_computed_in_fp32() -> None:
    rotary = RotaryEmbedding(config("default"), 256, CPU)
    cos, _ = rotary.at(torch.tensor([255]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16 and rotary.cos.dtype == torch.float32
    assert torch.equal(cos[0, 0], rotary.cos[255].to(torch.bfloat16))


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    settings = config("default")
    settings.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(CheckpointError, match="rope_type 'spiral'.*known are default, dynamic"):
        RotaryEmbedding(settings, 16, CPU)
