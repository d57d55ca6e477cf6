"""The sampling fields of OpenAI's API, and of vLLM's extensions to it -> SamplingParams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deployments import fields
from models import Guide, SamplingParams
from models.engine.guide import GuideKind
from models.errors import InvalidRequest

NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
INTEGERS = ("top_k", "seed", "min_tokens")
GUIDED: dict[str, GuideKind] = {
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice",
}  # fmt: skip
STRUCTURED: dict[str, GuideKind] = {
    "json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice",
}  # fmt: skip
NO_GUIDE = (None, False)


def parse_sampling(
    body: Mapping[str, Any], *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> tuple[SamplingParams, str]:
    """The parameters, and the field that the answer's form comes from, "" where it is free.

    Args:
        max_tokens: already checked.
        logprobs, prompt_logprobs: the two endpoints ask for them in different ways.

    Raises:
        InvalidRequest: a field is wrong.
    """
    given: dict[str, Any] = {}
    for name in NUMBERS:
        if body.get(name) is not None:
            given[name] = fields.number(name, body[name])
    for name in INTEGERS:
        if body.get(name) is not None:
            given[name] = fields.integer(name, body[name])
    if body.get("ignore_eos") is not None:
        given["ignore_eos"] = fields.boolean("ignore_eos", body["ignore_eos"])
    guide_field, guide = _guide(body)
    params = SamplingParams(
        max_new_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=_stop(body.get("stop")),
        stop_token_ids=_stop_token_ids(body.get("stop_token_ids")),
        logit_bias=_logit_bias(body.get("logit_bias")),
        guide=guide,
        **given,
    )
    return params, guide_field


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else fields.array("stop", value)
    return tuple(fields.text("stop", string) for string in strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = fields.array("stop_token_ids", value)
    return tuple(fields.integer("stop_token_ids", token) for token in ids)


def _logit_bias(value: object) -> dict[int, float]:
    """Token ids are strings in JSON objects."""
    biases: dict[int, float] = {}
    for key, bias in ({} if value is None else fields.mapping("logit_bias", value)).items():
        try:
            token = int(str(key)[:20])
        except ValueError:
            raise InvalidRequest(
                "logit_bias", f"{fields.show(key)} is no token id; keys must be integers"
            ) from None
        biases[token] = fields.number("logit_bias", bias)
    return biases


def _guide(body: Mapping[str, Any]) -> tuple[str, Guide | None]:
    """The one form that the request asks for, by any of the names for it."""
    asked = [
        *_from_response_format(body.get("response_format")),
        *_named(body, GUIDED, unsupported=("guided_grammar",)),
        *_structured(body.get("structured_outputs")),
    ]
    if len(asked) > 1:
        raise InvalidRequest(
            asked[1][0], f"cannot be combined with {asked[0][0]}; an answer has one form"
        )
    return (asked[0][0], _build(*asked[0])) if asked else ("", None)


def _from_response_format(value: object) -> list[tuple[str, GuideKind, Any]]:
    field = "response_format"
    if value is None:
        return []
    value = fields.mapping(field, value)
    kind = value.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [(field, "json_object", None)]
    if kind == "json_schema":
        outer = fields.mapping(f"{field}.json_schema", value.get("json_schema"))
        schema = outer.get("schema")
        if schema is None:
            raise InvalidRequest(
                f"{field}.json_schema.schema", "is missing; it must be the schema, an object"
            )
        return [(field, "json_schema", schema)]
    raise InvalidRequest(
        f"{field}.type", f"{fields.show(kind)} is none of text, json_object, json_schema"
    )


def _structured(value: object) -> list[tuple[str, GuideKind, Any]]:
    field = "structured_outputs"
    if value is None:
        return []
    return _named(
        fields.mapping(field, value), STRUCTURED, unsupported=("grammar", "structural_tag"),
        prefix=f"{field}.",
    )  # fmt: skip


def _named(
    values: Mapping[str, Any],
    kinds: Mapping[str, GuideKind],
    *,
    unsupported: tuple[str, ...],
    prefix: str = "",
) -> list[tuple[str, GuideKind, Any]]:
    for name in unsupported:
        if values.get(name) not in NO_GUIDE:
            raise InvalidRequest(
                f"{prefix}{name}", "is not supported; use a JSON schema, a regex or a choice"
            )
    return [
        (f"{prefix}{name}", kind, values[name])
        for name, kind in kinds.items()
        if values.get(name) not in NO_GUIDE
    ]


def _build(field: str, kind: GuideKind, value: Any) -> Guide:
    if kind == "json_object":
        return Guide(kind)
    if kind == "regex":
        value = fields.text(field, value)
    elif kind == "choice":
        value = json.dumps([fields.text(field, choice) for choice in fields.array(field, value)])
    elif not isinstance(value, str):  # a schema, which may come written out as well
        try:
            value = json.dumps(fields.mapping(field, value))
        except RecursionError:
            raise InvalidRequest(field, "is nested too deeply") from None
    try:
        return Guide(kind, value)
    except InvalidRequest as error:
        raise InvalidRequest(field, error.problem) from None
