"""A tokenizer's own chat template is rendered as transformers renders it, and does nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from models import SamplingParams, load_engine
from models.checkpoints import PromptSpec
from models.errors import CheckpointError, InvalidRequest
from models.prompts import (
    IMAGE,
    ImagePart,
    Message,
    TokenizerTemplate,
    chat_template,
    find_chat_template,
    load_template,
    load_tokenizer,
    stop_token_ids,
)
from tests.checkpoint_files import rewrite_json
from tests.tiny import write_tiny_llava
from tests.unit.prompts.tiny_tokenizers import write_llama_3, write_llava_hf, write_qwen2

CHATML = """{% if messages[0]['role'] != 'system' %}
    {{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
{% endif %}
{% for message in messages if message['content'] is not none %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# In the manner of llava-hf: typed parts, pictures first, marks for training.
PARTS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system message, please') }}"
    "{% endif %}{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = "
    "ns.count + 1 %}{{ m.content }}{% if not loop.last %}{{ eos_token }}{% else %}{% break %}"
    "{% endif %}{% endfor %}{{ ns.count }}{{ dict(a=1) | tojson }}"
)
CONVERSATION = [
    Message("system", "Be <b>brief</b>."),
    Message("user", [IMAGE, "What is 'this'?"]),
    Message("assistant", 'A cat "猫".'),
    Message("user", "Really?"),
]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    write_qwen2(tmp_path / "qwen")
    return tmp_path / "qwen"


def put(folder: Path, source: str) -> TokenizerTemplate:
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return TokenizerTemplate.load(folder, load_tokenizer(folder))


def as_json(messages: list[Message], parts: bool) -> list[dict[str, Any]]:
    """As clients of transformers write it."""

    def content(message: Message) -> Any:
        if parts:
            return [{"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": p}
                    for p in message.parts]  # fmt: skip
        return "\n".join("<image>" if isinstance(p, ImagePart) else p for p in message.parts)

    return [{"role": message.role, "content": content(message)} for message in messages]


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(
    ("source", "parts"), [(CHATML, False), (PARTS, True)], ids=["one text", "typed parts"]
)
def test_the_text_is_transformers_own(
    source: str, parts: bool, generation: bool, qwen: Path
) -> None:
    template = put(qwen, source)
    reference = AutoTokenizer.from_pretrained(qwen)
    for length in (2, 4) if generation else (2, 3, 4):
        messages = CONVERSATION[:length]
        assert template.render(messages, add_generation_prompt=generation) == (
            reference.apply_chat_template(
                as_json(messages, parts), tokenize=False, add_generation_prompt=generation
            )
        )


def test_a_templates_beginning_of_sequence_is_not_a_second_one(tmp_path: Path) -> None:
    """The ids are those of transformers, which then adds none itself."""
    write_llama_3(tmp_path)
    template = put(tmp_path, LLAMA_3)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        as_json(CONVERSATION, parts=False), add_generation_prompt=True
    )["input_ids"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(template.render(CONVERSATION)) == expected
    assert expected.count(tokenizer.bos_token_id) == 1


def test_names_and_filters_of_transformers_are_there(qwen: Path) -> None:
    template = put(qwen, STRICT)
    assert template.render(CONVERSATION[1:]) == (
        "<image>\nWhat is 'this'?<|im_end|>A cat \"猫\".<|im_end|>Really?3" + '{"a": 1}'
    )


def test_what_a_template_refuses_is_the_senders_fault_in_its_words(qwen: Path) -> None:
    with pytest.raises(InvalidRequest, match="^messages: .*No system message, please"):
        put(qwen, STRICT).render(CONVERSATION)


def test_answers_end_with_what_the_template_puts_behind_them(qwen: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    rewrite_json(qwen / "tokenizer_config.json", eos_token="<|endoftext|>")
    template = put(qwen, CHATML)
    assert template.stop_tokens == ("<|im_end|>",)
    both = {tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")}
    assert stop_token_ids(template, load_tokenizer(qwen)) == both
    write_llama_3(tmp_path / "llama")
    assert put(tmp_path / "llama", LLAMA_3).stop_tokens == ("<|eot_id|>",)
    assert put(qwen, PARTS).stop_tokens == (), "an ordinary word is no end"


# ---- where it is found ----------------------------------------------------------------------


def test_the_processors_template_goes_before_the_tokenizers(qwen: Path) -> None:
    assert find_chat_template(qwen) is None
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "tokenizer"}]
    rewrite_json(qwen / "tokenizer_config.json", chat_template=several)
    assert find_chat_template(qwen) == ("tokenizer_config.json", "tokenizer")
    (qwen / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert find_chat_template(qwen) == ("chat_template.json", "processor")
    (qwen / "chat_template.jinja").write_text("file")
    assert find_chat_template(qwen) == ("chat_template.jinja", "file")


@pytest.mark.parametrize("value", [5, [], {"other": "x"}, [{"name": "default"}], ["x"]])
def test_a_chat_template_of_another_kind_is_named(value: Any, qwen: Path) -> None:
    rewrite_json(qwen / "tokenizer_config.json", chat_template=value)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be a"):
        find_chat_template(qwen)


def test_a_folder_without_one_says_where_it_was_looked_for(qwen: Path) -> None:
    with pytest.raises(CheckpointError, match=r"qwen holds no chat template .*jinja.*choose anot"):
        load_template(PromptSpec("tokenizer"), qwen, load_tokenizer(qwen))


def test_llava_hfs_layout_has_one_for_pictures(tmp_path: Path) -> None:
    write_llava_hf(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    spec = PromptSpec("tokenizer", tokenization="whole")
    template = load_template(spec, tmp_path, load_tokenizer(tmp_path, "whole"))
    assert template.render(CONVERSATION[1:2]) == "USER: <image>\nWhat is 'this'? ASSISTANT:"


def test_where_the_encoder_ends_pictures_with_a_newline_the_text_has_none(qwen: Path) -> None:
    (qwen / "chat_template.jinja").write_text(CHATML)
    for suffix, text in (("\n", "<image>What"), ("", "<image>\nWhat")):
        spec = PromptSpec("tokenizer", tokenization="whole", image_suffix=suffix)
        template = load_template(spec, qwen, load_tokenizer(qwen, "whole"))
        assert f"user\n{text} is 'this'?<|im_end|>" in template.render(CONVERSATION[1:2])


def test_an_engine_answers_what_its_checkpoints_template_wrote(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", awq=False)
    (folder / "chat_template.jinja").write_text(PARTS)
    with load_engine(
        folder, precision="W16A16", template="tokenizer", device="cpu", dtype="float32",
        num_threads=1,
    ) as engine:  # fmt: skip
        prompt = engine.template.render(CONVERSATION)
        assert prompt.endswith("ASSISTANT:") and prompt.count("<image>") == 1
        params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
        picture = Image.new("RGB", (20, 20))
        deltas = list(engine.generate(prompt, [picture], params))
        assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 4
        assert engine.stop_token_ids == {2}


# ---- a stranger's program -------------------------------------------------------------------


FORBIDDEN = r"cannot write a conversation \((SecurityError|UndefinedError|TypeError)"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
        "{% set ns = namespace(__class__=dict) %}{{ ns }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ('%s' | format).__globals__ }}",
        "{% include 'tokenizer_config.json' %}",
        "{% import 'os' as os %}",
    ],
)
def test_what_the_sandbox_forbids_is_refused_at_loading(
    attack: str, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(qwen)
    with pytest.raises(CheckpointError, match=FORBIDDEN):
        put(qwen, attack + CHATML)
    assert not (qwen / "OWNED").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"chat_template\.jinja: the chat template is no valid Jinja \(line 1:"),
        ("{{ messages[0].content.foo.bar }}", "cannot write a conversation .UndefinedError"),
        ("Hello!", "drops or repeats what it is given"),
        ("{{ messages[0].content * 2 }}", "drops or repeats what it is given"),
        ("x" * (2**18 + 1), "has 262145 characters; at most 262144"),
        ("{{ raise_exception('never') }}", "TemplateError: never"),
    ],
)
def test_a_template_that_cannot_be_used_is_the_checkpoints_fault(
    source: str, message: str, qwen: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        put(qwen, source)


def test_a_template_without_an_end_is_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TRIAL_SECONDS", 0.05)
    loop = "{% for i in range(9999) %}{% for j in range(500) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match=r"does not come to an end within 0\.05 s"):
        put(qwen, loop + CHATML)


def test_an_endless_text_is_cut_off(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = put(qwen, CHATML)
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        template.render([Message("user", "x" * 2000)])
    with pytest.raises(CheckpointError, match="more than 1000 characters"):
        put(qwen, "{% for i in range(99999) %}{{ 'lots of text' }}{% endfor %}")
