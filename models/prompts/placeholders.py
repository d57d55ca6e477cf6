"""`<image>` in a prompt -> IMAGE_TOKEN_ID among its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.errors import CheckpointError, InvalidRequest
from models.prompts.tokenizer import IMAGE_PLACEHOLDER, Tokenizer

if TYPE_CHECKING:
    from models.checkpoints import PromptSpec

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
    """Token ids, one IMAGE_TOKEN_ID for each `<image>`, and behind it the ids of the model's
    `image_suffix`.

    As the models were trained: the text between pictures is tokenised piece by piece, and only
    the first piece keeps the beginning-of-sequence token; or the whole is tokenised at once,
    `<image>` being one of the tokenizer's tokens.

    Args:
        tinychat_prompt_rewrite: put TinyChat's backslash, "n" and space behind each picture.

    Raises:
        InvalidRequest: the prompt has not as many `<image>` as there are pictures.
    """
    _check_count(prompt.count(IMAGE_PLACEHOLDER), num_images)
    before, after = "", ""
    if prompt_spec.use_im_start_end:
        _check_frame(tokenizer)
        before, after = IMAGE_START, IMAGE_END
    if tinychat_prompt_rewrite:
        after += TINYCHAT_SUFFIX
    text = prompt.replace(IMAGE_PLACEHOLDER, before + IMAGE_PLACEHOLDER + after)
    own_id = tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    if prompt_spec.tokenization == "whole" and own_id is not None:
        ids = [IMAGE_TOKEN_ID if i == own_id else i for i in tokenizer.encode(text)]
        _check_count(ids.count(IMAGE_TOKEN_ID), num_images)
    else:
        ids = _encode_pieces(text, tokenizer)
    if num_images and prompt_spec.image_suffix:
        # As the model's image encoder makes it, which calls the tokenizer as for a text of its
        # own: with the beginning-of-sequence token, where there is one.
        suffix = tokenizer.encode(prompt_spec.image_suffix)
        ids = [out for i in ids for out in ((i, *suffix) if i == IMAGE_TOKEN_ID else (i,))]
    return ids


def _encode_pieces(text: str, tokenizer: Tokenizer) -> list[int]:
    token_ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        ids = tokenizer.encode(piece)
        if index > 0:
            token_ids.append(IMAGE_TOKEN_ID)
            if ids[:1] == [tokenizer.bos_token_id]:
                ids = ids[1:]
        token_ids += ids
    return token_ids


def _check_count(found: int, num_images: int) -> None:
    if found != num_images:
        raise InvalidRequest(
            "images",
            f"{num_images} given, but {found} {IMAGE_PLACEHOLDER} in the prompt; there must be "
            "one for each",
        )


def _check_frame(tokenizer: Tokenizer) -> None:
    for token in (IMAGE_START, IMAGE_END):
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError(
                f"config.json says mm_use_im_start_end, but the tokenizer has no {token}; the "
                "checkpoint's added_tokens.json or tokenizer_config.json is not the model's own"
            )
