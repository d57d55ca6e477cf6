"""LLaVA and VILA models, W4A16 or 16-bit, and the engine that batches them. Plain PyTorch.

    from models import SamplingParams, load_engine

    engine = load_engine("models/demo/checkpoint/...")
    for delta in engine.generate(prompt, images=[image], params=SamplingParams(temperature=0)):
        print(delta.text, end="")

Nothing below this package knows of Ray or HTTP. The names are resolved on first use, so that a
process that only needs the error types or `SamplingParams` (the controller sidecar, a client of a
DeploymentHandle) does not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.engine.engine import Engine as Engine
    from models.engine.guide import Guide as Guide
    from models.engine.messages import EngineStats as EngineStats
    from models.engine.messages import GenerationDelta as GenerationDelta
    from models.engine.messages import PromptToken as PromptToken
    from models.engine.messages import TokenLogprobs as TokenLogprobs
    from models.engine.messages import Usage as Usage
    from models.engine.options import EngineOptions as EngineOptions
    from models.engine.preparation import Prompt as Prompt
    from models.engine.sampling_params import SamplingParams as SamplingParams
    from models.loading import load_engine as load_engine

_HOME = {
    "Engine": "models.engine.engine",
    "EngineOptions": "models.engine.options",
    "EngineStats": "models.engine.messages",
    "GenerationDelta": "models.engine.messages",
    "Guide": "models.engine.guide",
    "Prompt": "models.engine.preparation",
    "PromptToken": "models.engine.messages",
    "SamplingParams": "models.engine.sampling_params",
    "TokenLogprobs": "models.engine.messages",
    "Usage": "models.engine.messages",
    "load_engine": "models.loading",
}
__all__ = [*_HOME]  # noqa: PLE0604 - strings, from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
