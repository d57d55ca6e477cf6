"""`<image>` in a prompt -> IMAGE_TOKEN_ID among its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.errors import CheckpointError, InvalidRequest
from models.prompts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from models.checkpoints import PromptSpec

IMAGE_PLACEHOLDER = "<image>"
IMAGE_TOKEN_ID = -200
"""LLaVA's number for a picture's place; in no vocabulary."""
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
TINYCHAT_SUFFIX = "\\n "
"""Three characters: TinyChat's worker meant a newline, and models have been measured with this."""


def tokenize_prompt(
    prompt: str,
    tokenizer: Tokenizer,
    *,
    num_images: int,
    prompt_spec: PromptSpec,
    tinychat_prompt_rewrite: bool = False,
) -> list[int]:
    """Token ids, one IMAGE_TOKEN_ID for each `<image>`.

    As the models were trained: the text between pictures is tokenised piece by piece, and only
    the first piece keeps the beginning-of-sequence token.

    Args:
        tinychat_prompt_rewrite: put TinyChat's backslash, "n" and space behind each picture.

    Raises:
        InvalidRequest: the prompt has not as many `<image>` as there are pictures.
    """
    pieces = prompt.split(IMAGE_PLACEHOLDER)
    if len(pieces) - 1 != num_images:
        raise InvalidRequest(
            "images",
            f"{num_images} given, but {len(pieces) - 1} {IMAGE_PLACEHOLDER} in the prompt; there "
            "must be one for each",
        )
    before, after = "", ""
    if prompt_spec.use_im_start_end:
        _check_frame(tokenizer)
        before, after = IMAGE_START, IMAGE_END
    if tinychat_prompt_rewrite:
        after += TINYCHAT_SUFFIX
    token_ids: list[int] = []
    for index, piece in enumerate(pieces):
        is_first, is_last = index == 0, index == num_images
        text = f"{'' if is_first else after}{piece}{'' if is_last else before}"
        ids = tokenizer.encode(text)
        if not is_first and ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
        token_ids += ids if is_last else [*ids, IMAGE_TOKEN_ID]
    return token_ids


def _check_frame(tokenizer: Tokenizer) -> None:
    for token in (IMAGE_START, IMAGE_END):
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError(
                f"config.json says mm_use_im_start_end, but the tokenizer has no {token}; the "
                "checkpoint's added_tokens.json or tokenizer_config.json is not the model's own"
            )
