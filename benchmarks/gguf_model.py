"""Random weights as a GGUF file that llama.cpp runs: only its speed can be asked of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.checkpoints.synthesis.family import LanguageModel

BLOCK, BLOCK_BYTES = 32, 18
"""Of Q4_0: an fp16 scale and 32 nibbles."""


def write_q4_0(path: Path, language: LanguageModel, vocabulary: int) -> None:
    """A Llama with 4-bit linears and embeddings, and an output of 16 bits, as ours has."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(language.positions)
    writer.add_embedding_length(language.hidden)
    writer.add_block_count(language.layers)
    writer.add_feed_forward_length(language.intermediate)
    writer.add_head_count(language.heads)
    writer.add_head_count_kv(language.kv_heads)
    writer.add_layer_norm_rms_eps(language.eps)
    writer.add_rope_dimension_count(language.hidden // language.heads)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocabulary))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    generator = np.random.default_rng(0)

    def quantized(name: str, n: int, k: int) -> None:
        blocks = generator.integers(0, 256, (n, k // BLOCK, BLOCK_BYTES), dtype=np.uint8)
        scales = np.full((n, k // BLOCK, 1), 1 / (4 * k**0.5), np.float16)
        blocks[..., :2] = scales.view(np.uint8)
        writer.add_tensor(name, blocks.reshape(n, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    hidden, inner = language.hidden, language.intermediate
    kv = hidden // language.heads * language.kv_heads
    quantized("token_embd.weight", vocabulary, hidden)
    for layer in range(language.layers):
        for name, n, k in (
            ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ):  # fmt: skip
            quantized(f"blk.{layer}.{name}.weight", n, k)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    head = generator.standard_normal((vocabulary, hidden), np.float32) / hidden**0.5
    writer.add_tensor("output.weight", head.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
