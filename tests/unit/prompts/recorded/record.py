"""Records what transformers' slow LlamaTokenizer makes of the texts of texts.json.

Run once, with a release that still had it (4.46.3), outside of this project's environment:

    python -m venv /tmp/tf4 && /tmp/tf4/bin/pip install transformers==4.46.3 sentencepiece protobuf
    /tmp/tf4/bin/python tests/unit/prompts/recorded/record.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaTokenizer  # type: ignore[attr-defined]

HERE = Path(__file__).parent
ADDED = ["<im_patch>", "<im_start>", "<im_end>"]


def main() -> None:
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    recorded = []
    for legacy in (True, False):
        for added in ([], ADDED):
            tokenizer = LlamaTokenizer(str(HERE / "tokenizer.model"), legacy=legacy)
            tokenizer.add_tokens(added, special_tokens=True)
            for text in texts:
                ids = tokenizer(text).input_ids
                recorded.append({"legacy": legacy, "added": added, "text": text, "ids": ids})
    path = HERE / "slow_llama_tokenizer.json"
    lines = ",\n".join(json.dumps(entry) for entry in recorded)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
