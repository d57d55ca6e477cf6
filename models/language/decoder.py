"""The decoder of Llama and its relatives, on packed tokens of many sequences at once.

Linear layers are found by their fused names (`qkv_proj`, `gate_up_proj`); the loader puts a plain
or a 4-bit linear there (`models/language/loading.py`). Layers may lie on several devices; what they
compute with is handed over where the device changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.language.attention_backends import StepLayout
from models.language.families import attention_bias
from models.language.fused import add_rms_norm, rms_norm, swiglu
from models.language.kv_cache import KVCache, head_dim
from models.language.rope import RotaryEmbedding
from models.native import kernels
from models.placement import Placement


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim(config)
        bias = attention_bias(config)
        q = config.num_attention_heads * self.head_dim
        kv = config.num_key_value_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, q + 2 * kv, bias=bias.qkv)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=bias.output)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, batch: StepLayout
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        out: Tensor = self.o_proj(batch.attend(qkv, rotation, cache, self.layer).flatten(1))
        return out


class MLP(nn.Module):
    """The gated feed-forward part (SwiGLU; Shazeer, 2020)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: StepLayout,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is x + delta, which the next norm adds up; so is what is returned.

        Args:
            delta: None: nothing is to be added yet.
        """
        x, normed = self.input_layernorm.add(x, delta)
        x, normed = self.post_attention_layernorm.add(
            x, self.self_attn(normed, rotation, cache, batch)
        )
        return x, self.mlp(normed)


class Transformer(nn.Module):
    """Embedding, layers and final norm; the `model.` of the checkpoints' names."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model that reads embeddings and keeps its past in a paged KV cache.

    Attributes:
        placement: where its parts lie, or will.
    """

    def __init__(self, config: PreTrainedConfig, placement: Placement | None = None) -> None:
        """
        Args:
            placement: default: all on the CPU.
        """
        super().__init__()
        self.config = config
        self.placement = placement or Placement.single(
            torch.device("cpu"), config.num_hidden_layers
        )
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary: RotaryEmbedding | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """(tokens,) int64 -> (tokens, hidden)."""
        out: Tensor = self.model.embed_tokens(token_ids)
        return out

    def forward(self, x: Tensor, cache: KVCache, batch: StepLayout) -> Tensor:
        """(tokens, hidden) embeddings -> (tokens, hidden) final states; writes the KV cache.

        Embeddings and `batch` are on the embedding's device, the final states on the norm's.
        """
        assert self.rotary is not None, "the loader tabulates the rotary embedding"
        rotation = self.rotary.at(batch.positions, x.dtype)
        here, delta = self.placement.embedding, None
        for layer, device in zip(self.model.layers, self.placement.layers, strict=True):
            if device != here:
                cos, sin = rotation
                x, delta = _sum(x, delta).to(device), None
                rotation = cos.to(device), sin.to(device)
                batch, here = batch.to(device), device
            x, delta = layer(x, delta, rotation, cache, batch)
        if self.placement.norm != here:
            x, delta = _sum(x, delta).to(self.placement.norm), None
        out: Tensor = self.model.norm.add(x, delta)[1]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary), float32, on the head's device."""
        hidden = hidden.to(self.placement.head)
        weight = self.lm_head.weight if type(self.lm_head) is nn.Linear else None
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            library = kernels()
            if library is not None:
                return library.dense_matmul(hidden.contiguous(), weight)
        out: Tensor = self.lm_head(hidden)
        return out.float()


def _sum(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta
