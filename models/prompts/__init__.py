"""A client's prompt -> the model's tokens: tokenizers, picture placeholders, templates.

tokenizer.py        what the engine needs of a tokenizer, and which kind a folder holds
sentencepiece_.py   Llama's own (`tokenizer.model`), as transformers' slow class had it
huggingface.py      everything else, through AutoTokenizer
placeholders.py     `<image>` in a prompt -> IMAGE_TOKEN_ID among its tokens
messages.py         a conversation as chat endpoints take it
templates.py        the conversation formats that models were trained with
chat_template.py    the one that a tokenizer brings along, as Jinja
"""

from __future__ import annotations

from models.prompts.chat_template import TokenizerTemplate, find_chat_template
from models.prompts.messages import IMAGE, ImagePart, Message
from models.prompts.placeholders import IMAGE_TOKEN_ID, tokenize_prompt
from models.prompts.templates import (
    TEMPLATES,
    Template,
    get_template,
    load_template,
    stop_token_ids,
    written_templates,
)
from models.prompts.tokenizer import IMAGE_PLACEHOLDER, Tokenizer, load_tokenizer

__all__ = [
    "IMAGE",
    "IMAGE_PLACEHOLDER",
    "IMAGE_TOKEN_ID",
    "TEMPLATES",
    "ImagePart",
    "Message",
    "Template",
    "Tokenizer",
    "TokenizerTemplate",
    "find_chat_template",
    "get_template",
    "load_template",
    "load_tokenizer",
    "stop_token_ids",
    "tokenize_prompt",
    "written_templates",
]
