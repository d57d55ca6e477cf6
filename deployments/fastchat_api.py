"""FastChat's worker routes, beside those that it shares with LLaVA and TinyChat.

With them FastChat's own OpenAI server, unmodified, can stand in front of this worker. Errors are
records here too, with status 200: its clients look at `error_code`.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from fastapi import APIRouter, Request

from deployments.model_worker import ModelWorker
from deployments.records import error_record
from deployments.worker_api import read_params
from models.errors import InvalidRequest


class SeparatorStyle(IntEnum):
    """FastChat's numbers (`fastchat.conversation.SeparatorStyle`), of which those behind LLAMA2
    are other ones in every release."""

    ADD_COLON_SINGLE = 1
    ADD_COLON_TWO = 2
    NO_COLON_SINGLE = 4
    LLAMA2 = 7


@dataclass(frozen=True)
class Format:
    """How FastChat's `Conversation` puts one of our templates together."""

    style: SeparatorStyle
    roles: tuple[str, str]
    sep: str
    sep2: str | None = None
    system_template: str = "{system_message}"
    stop_str: str | None = None


_VICUNA = Format(SeparatorStyle.ADD_COLON_TWO, ("USER", "ASSISTANT"), " ", "</s>")
_LLAMA_2 = Format(
    SeparatorStyle.LLAMA2, ("[INST]", "[/INST]"), " ", " </s><s>",
    "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
)  # fmt: skip
_CHATML = Format(
    SeparatorStyle.NO_COLON_SINGLE, ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "<|im_end|>", system_template="<|im_start|>system\n{system_message}<|im_end|>",
)  # fmt: skip
_QWEN = replace(
    _CHATML, sep="<|im_end|>\n",
    system_template="<|im_start|>system\n{system_message}<|im_end|>\n",
)  # fmt: skip

FORMATS: dict[str, Format] = {
    "vicuna_v1": _VICUNA,
    "llava_v1": _VICUNA,
    "llava_v0": Format(
        SeparatorStyle.ADD_COLON_SINGLE, ("Human", "Assistant"), "###", stop_str="###"
    ),
    "llava_llama_2": _LLAMA_2,
    "mistral_instruct": replace(_LLAMA_2, sep2=" </s>"),
    "chatml_direct": _CHATML,
    "hermes-2": _CHATML,
    "llama_3": Format(
        SeparatorStyle.NO_COLON_SINGLE,
        ("<|start_header_id|>user<|end_header_id|>\n\n",
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        "<|eot_id|>",
        system_template="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "{system_message}<|eot_id|>",
    ),
    "qwen": _QWEN,
    "nvila": _QWEN,
    "plain": Format(SeparatorStyle.NO_COLON_SINGLE, ("", ""), "\n", stop_str="\n"),
}  # fmt: skip
"""By the names in `models.prompts`."""


def conversation(template: str, system: str, stop_token_ids: list[int]) -> dict[str, Any]:
    """The fields of FastChat's `Conversation`, for an empty one.

    Raises:
        InvalidRequest: FastChat has no way to write this template.
    """
    if template not in FORMATS:
        raise InvalidRequest(
            "conv",
            f"the model's conversation template is {template!r}, a program that FastChat cannot "
            f"run; the worker's conv_mode can be one of: {', '.join(FORMATS)}",
        )
    known = FORMATS[template]
    return {
        "name": template,
        "system_template": known.system_template,
        "system_message": system,
        "roles": list(known.roles),
        "messages": [],
        "offset": 0,
        "sep_style": int(known.style),
        "sep": known.sep,
        "sep2": known.sep2,
        "stop_str": known.stop_str,
        "stop_token_ids": stop_token_ids,
    }


def fastchat_routes(worker: ModelWorker) -> APIRouter:
    """`/worker_generate`, `/count_token`, `/worker_get_conv_template`, `/model_details`."""
    router = APIRouter(tags=["FastChat"])

    @router.post("/worker_generate")
    async def generate(request: Request) -> dict[str, Any]:
        """The whole answer as one JSON object: the stream's last record."""
        try:
            params = await read_params(request, worker)
            record: dict[str, Any] = {}
            async with aclosing(worker.generate_stream(params)) as records:
                async for latest in records:
                    record = latest
        except Exception as error:
            return error_record(error)
        return record

    @router.post("/count_token")
    async def count_token(request: Request) -> dict[str, Any]:
        """How many tokens a prompt has; each `<image>` counts with all its positions."""
        try:
            params = await read_params(request, worker)
            prompt = params.get("prompt") if isinstance(params, dict) else None
            if not isinstance(prompt, str):
                raise InvalidRequest("prompt", "is missing; it must be a string")
            return {"count": await worker.count_tokens(prompt), "error_code": 0}
        except Exception as error:
            return {"count": 0, **error_record(error)}

    @router.post("/worker_get_conv_template")
    async def get_conv_template() -> dict[str, Any]:
        """The model's conversation template."""
        template = worker.template
        stop_ids = list(worker.engine.stop_token_ids)
        try:
            return {"conv": conversation(template.name, template.system, stop_ids)}
        except InvalidRequest as error:
            return error_record(error)

    @router.post("/model_details")
    async def model_details() -> dict[str, Any]:
        """The context's length in tokens."""
        return {"context_length": worker.engine.context_length}

    return router
