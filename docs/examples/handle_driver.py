"""Ask the model from a script, without HTTP.

    python docs/examples/handle_driver.py docs/shapes.png "What is in this image?"

Connects to the Ray that `serve run` (or RAY_ADDRESS) has started.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray import serve

picture, question = sys.argv[1:3]
application = sys.argv[3] if len(sys.argv) > 3 else "tinychat"

ray.init(address="auto", namespace="serve", log_to_driver=False)
handle = serve.get_app_handle(application).options(stream=True)
for piece in handle.generate.remote(
    prompt=f"USER: <image>\n{question} ASSISTANT:",
    images=[Path(picture).read_bytes()],
    temperature=0,
):
    print(piece["text"], end="", flush=True)
print()
