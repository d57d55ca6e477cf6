"""Records what LLaVA's and VILA's own code makes of conversations.

Run once, with the repositories checked out (LLaVA c121f04, VILA b760c34):

    python tests/unit/prompts/recorded/record_prompts.py LLAVA VILA
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

from jinja2 import Environment

HERE = Path(__file__).parent
TURNS = [
    ("<image>\nWhat is shown?", "A red square."),
    ("Why {text} or {system}?", "Because:\n\n1. it is\n2. a  square"),
    ("<image>\n<image>\nGr\u00fc\u00dfe, \u732b? ### </s>", "\u732b."),
]
BY_REPOSITORY = {
    "LLaVA": (
        "vicuna_v1", "llava_v1", "llava_v0", "llava_llama_2", "mistral_instruct", "chatml_direct",
        "plain",
    ),
    "VILA": ("vicuna_v1", "hermes-2", "llama_3"),
}  # fmt: skip


def main(llava: str, vila: str) -> None:
    logger = types.ModuleType("llava.utils.logging")
    logger.logger = logging.getLogger()  # type: ignore[attr-defined]
    sys.modules["llava.utils.logging"] = logger
    recorded: list[dict[str, Any]] = []
    for repository, folder in (("LLaVA", llava), ("VILA", vila)):
        conversations = _module(Path(folder) / "llava" / "conversation.py").conv_templates
        for name in BY_REPOSITORY[repository]:
            for count in range(1, 2 if name == "plain" else len(TURNS) + 1):
                conversation = conversations[name].copy()
                for user, assistant in TURNS[: count - 1]:
                    conversation.append_message(conversation.roles[0], user)
                    conversation.append_message(conversation.roles[1], assistant)
                conversation.append_message(conversation.roles[0], TURNS[count - 1][0])
                conversation.append_message(conversation.roles[1], None)
                recorded.append(_entry(repository, name, count, conversation.get_prompt()))
    chat_templates = Path(vila) / "llava/model/language_model/chat_templates"
    # As VILA's builder reads it.
    source = (chat_templates / "qwen2.jinja").read_text(encoding="utf-8")
    template = Environment().from_string(source.replace("    ", "").replace("\n", ""))
    for count in range(1, len(TURNS) + 1):
        messages = []
        for user, assistant in TURNS[:count]:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        prompt = template.render(messages=messages[:-1], add_generation_prompt=True)
        recorded.append(_entry("VILA", "nvila", count, prompt))
    lines = ",\n".join(json.dumps(entry) for entry in recorded)
    (HERE / "prompts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("conversation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conversation"] = module
    spec.loader.exec_module(module)
    return module


def _entry(repository: str, name: str, count: int, prompt: str) -> dict[str, Any]:
    return {"from": repository, "template": name, "turns": TURNS[:count], "prompt": prompt}


if __name__ == "__main__":
    main(*sys.argv[1:])
