"""Weights by checkpoint names -> a decoder whose layers are fused and packed for its device.

The checkpoints' names are unfused. The decoder is built on `meta`, the names and shapes are
checked against the files' headers before any data is read, and each layer is then fetched, fused,
packed for the device and let go, so that the peak of memory is one layer above the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig

from models.awq import QuantizedWeight, W4A16Linear
from models.checkpoints import WeightSource
from models.checkpoints.parameters import load_parameter
from models.errors import CheckpointError
from models.language.decoder import Decoder
from models.language.families import attention_bias
from models.language.kv_cache import head_dim
from models.language.rope import RotaryEmbedding
from models.placement import Placement

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Module of ours -> the checkpoint's modules, joined along the output dimension."""


def load_decoder(
    source: WeightSource,
    config: PreTrainedConfig,
    *,
    max_positions: int,
    device: torch.device | Placement,
    dtype: torch.dtype,
    backend: str,
) -> Decoder:
    """The decoder, ready to run.

    Args:
        source: the language model's tensors, under transformers' names for a causal LM.
        max_positions: longest sequence that will be computed.
        device: of the whole decoder, or of each of its parts.
        backend: of the 4-bit linears; see `models.awq.backends`.

    Raises:
        CheckpointError: a tensor is missing, left over or misshaped.
    """
    if isinstance(device, torch.device):
        device = Placement.single(device, config.num_hidden_layers)
    with init_empty_weights():
        decoder = Decoder(config, device)
    _check(source, config)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            _place_linear(decoder, name, source, dtype, backend)
        else:
            for parameter, _ in module.named_parameters(recurse=False):
                full = f"{name}.{parameter}"
                _place(decoder, full, [full], source, dtype)
    decoder.rotary = RotaryEmbedding(config, max_positions, device.embedding)
    return decoder.eval().requires_grad_(False)


def linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear inside the layers, by its checkpoint name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * head_dim(config)
    kv = config.num_key_value_heads * head_dim(config)
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }


def _check(source: WeightSource, config: PreTrainedConfig) -> None:
    """Strict: every tensor there, of the right shape, and none besides."""
    hidden, vocab = config.hidden_size, config.vocab_size
    plain: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings or "lm_head.weight" in source.names():
        plain["lm_head.weight"] = (vocab, hidden)
    for index in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{index}.{norm}.weight"] = (hidden,)
    quantized: dict[str, tuple[int, int]] = {}
    bias, mlp_bias = attention_bias(config), bool(getattr(config, "mlp_bias", False))
    for name, shape in linear_shapes(config).items():
        if source.is_quantized(name):
            quantized[name] = shape
        else:
            plain[f"{name}.weight"] = shape
        if ".mlp." in name:
            has_bias = mlp_bias
        else:
            has_bias = bias.output if name.endswith("o_proj") else bias.qkv
        if has_bias:
            plain[f"{name}.bias"] = shape[:1]
    source.check(plain, quantized)


def _place_linear(
    decoder: Decoder,
    name: str,
    source: WeightSource,
    dtype: torch.dtype,
    backend: str,
) -> None:
    device = decoder.placement.of(name)
    parts = list(_checkpoint_names(name))
    biased = decoder.get_submodule(name).bias is not None
    biases = [f"{part}.bias" for part in parts]
    if source.are_quantized(parts):
        try:
            weight = QuantizedWeight.cat([source.quantized(part) for part in parts])
        except ValueError as error:
            raise CheckpointError(f"{name}, made of {', '.join(parts)}: {error}") from error
        bias = torch.cat([source.get(each) for each in biases]) if biased else None
        parent, _, attribute = name.rpartition(".")
        linear = W4A16Linear.from_quantized(
            weight, bias, backend=backend, device=device, dtype=dtype
        )
        setattr(decoder.get_submodule(parent), attribute, linear)
        return
    if name == "lm_head" and "lm_head.weight" not in source.names():
        tied = decoder.model.embed_tokens.weight  # placed before it
        if device == decoder.placement.embedding:
            decoder.lm_head.weight = tied
        else:
            decoder.lm_head.weight = nn.Parameter(tied.to(device), requires_grad=False)
        return
    _place(decoder, f"{name}.weight", [f"{part}.weight" for part in parts], source, dtype)
    if biased:
        _place(decoder, f"{name}.bias", biases, source, dtype)


def _checkpoint_names(name: str) -> Iterator[str]:
    parent, _, module = name.rpartition(".")
    for part in FUSED.get(module, (module,)):
        yield f"{parent}.{part}" if parent else part


def _place(
    decoder: Decoder, name: str, parts: Sequence[str], source: WeightSource, dtype: torch.dtype
) -> None:
    device = decoder.placement.of(name)
    load_parameter(decoder, name, parts, source, device=device, dtype=dtype)
