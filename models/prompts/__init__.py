"""A client's prompt -> the model's tokens: tokenizers, picture placeholders, templates.

tokenizer.py        what the engine needs of a tokenizer, and which kind a folder holds
sentencepiece_.py   Llama's own (`tokenizer.model`), as transformers' slow class had it
huggingface.py      everything else, through AutoTokenizer
placeholders.py     `<image>` in a prompt -> IMAGE_TOKEN_ID among its tokens
templates.py        the conversation formats that models were trained with
"""

from __future__ import annotations

from models.prompts.placeholders import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, tokenize_prompt
from models.prompts.templates import TEMPLATES, Template, get_template
from models.prompts.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IMAGE_PLACEHOLDER",
    "IMAGE_TOKEN_ID",
    "TEMPLATES",
    "Template",
    "Tokenizer",
    "get_template",
    "load_tokenizer",
    "tokenize_prompt",
]
