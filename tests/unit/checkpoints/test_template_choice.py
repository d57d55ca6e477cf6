"""Templates are chosen as LLaVA, VILA and TinyChat choose them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from models.checkpoints import open_checkpoint
from models.checkpoints.template_choice import choose_template
from models.errors import ConfigurationError
from tests.checkpoint_files import rewrite_json
from tests.tiny import write_tiny_llava

LLAMA = LlamaConfig(vocab_size=32_000)
LLAMA_3 = LlamaConfig(vocab_size=128_256)
MISTRAL = MistralConfig(vocab_size=32_000)
QWEN2 = Qwen2Config(vocab_size=152_064)
CHAT_TEMPLATE = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("name", "language", "template"),
    [
        ("llava-v1.5-7b", LLAMA, "vicuna_v1"),
        ("llava-v1.6-vicuna-13b", LLAMA, "vicuna_v1"),
        ("llava-v1.6-mistral-7b", MISTRAL, "mistral_instruct"),
        ("llava-v1.6-34b", LLAMA, "chatml_direct"),
        ("llava-mixtral-8x7b-hermes", MISTRAL, "chatml_direct"),
        ("llava-7b-v1", LLAMA, "llava_v1"),
        ("llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", LLAMA, "llava_v1"),
        ("LLaVA-7B-v0", LLAMA, "llava_v0"),
        ("llava-llama-2-13b-chat-lightning-preview", LLAMA, "llava_llama_2"),
        # transformers' layout
        ("llava-1.5-7b-hf", LLAMA, "vicuna_v1"),
        ("llava-v1.6-vicuna-7b-hf", LLAMA, "vicuna_v1"),
        ("llava-v1.6-mistral-7b-hf", MISTRAL, "mistral_instruct"),
        ("llava-v1.6-34b-hf", LLAMA, "chatml_direct"),
        ("llama3-llava-next-8b-hf", LLAMA_3, "llama_3"),
        ("llava-next-72b-hf", QWEN2, "qwen"),
        # VILA's list
        ("VILA-7b-4bit-awq", LLAMA, "vicuna_v1"),
        ("VILA1.5-3b", LLAMA, "vicuna_v1"),
        ("VILA1.5-3b-s2-AWQ", LLAMA, "vicuna_v1"),
        ("vila-1.5-13b-AWQ", LLAMA, "vicuna_v1"),
        ("vila1.5-8b", LLAMA_3, "llama_3"),
        ("Llama-3-VILA1.5-8B-AWQ", LLAMA_3, "llama_3"),
        ("VILA1.5-40b", LLAMA, "hermes-2"),
        ("nvila15b", QWEN2, "vicuna_v1"),
        ("NVILA-8B", QWEN2, "nvila"),
        ("NVILA-Lite-2B-AWQ", QWEN2, "nvila"),
        # TinyChat's exception: the beginning of "llama-30b"
        ("llava-llama-30b", LLAMA, "vicuna_v1"),
        ("30b-vila-llama-3", LLAMA, "vicuna_v1"),
        # names that say nothing
        ("anything", LLAMA, "vicuna_v1"),
        ("anything", LLAMA_3, "llama_3"),
        ("anything", MISTRAL, "mistral_instruct"),
        ("anything", QWEN2, "qwen"),
    ],
)
def test_templates_by_the_models_names(
    name: str, language: PreTrainedConfig, template: str
) -> None:
    assert choose_template(name, language) == template


def test_without_a_telling_name_the_tokenizers_own_counts(tmp_path: Path) -> None:
    assert choose_template("anything", LLAMA, tmp_path) == "vicuna_v1", "it has none"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert choose_template("anything", LLAMA, tmp_path) == "tokenizer"
    assert choose_template("anything", QWEN2, tmp_path) == "tokenizer"
    assert choose_template("llava-v1.5-7b", LLAMA, tmp_path) == "vicuna_v1"
    assert choose_template("NVILA-8B", QWEN2, tmp_path) == "nvila"


def test_a_checkpoint_is_opened_with_what_its_folder_speaks_for(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "my-model", awq=False)

    def chosen(template: str | None = None) -> str:
        return open_checkpoint(folder, precision="W16A16", template=template).spec.prompt.template

    assert chosen() == "vicuna_v1"
    assert chosen("tokenizer") == "tokenizer"
    rewrite_json(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    assert chosen() == "tokenizer"
    assert chosen("hermes-2") == "hermes-2"
    with pytest.raises(ConfigurationError, match="'alpaca'; known: vicuna_v1, .*nvila.*tokenizer"):
        chosen("alpaca")
