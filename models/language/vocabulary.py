"""Whether a tokenizer and a language model's embeddings belong together."""

from __future__ import annotations

from transformers import PreTrainedConfig

from models.errors import CheckpointError
from models.prompts import Tokenizer

NEVER_EMBEDDED = ("<image>", "<vila/sentinel>", "<vila/video>", "<im_patch>", "<pad>", "[PAD]")
"""Tokens that stand for pictures or fill up batches. VILA's and LLaVA's code adds them behind the
vocabulary and grows the embeddings for them at load; no sequence that is computed here has them."""


def check_vocabulary(tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has tokens that the model has no embeddings for.
    """
    ids = (tokenizer.token_to_id(token) for token in NEVER_EMBEDDED)
    beyond = {token for token in ids if token is not None and token >= config.vocab_size}
    if tokenizer.vocab_size > config.vocab_size + len(beyond):
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the language model's "
            f"vocabulary is smaller: {config.vocab_size} (vocab_size in its config.json); the "
            "tokenizer's files are another model's, or tokens were added to them"
        )
