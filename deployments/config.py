"""What `args:` in serve_config.yaml may say: TinyChat's words, and vLLM's for the engine."""

from __future__ import annotations

import difflib
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.prompts.templates import TEMPLATES

ANY_MAX_NEW_TOKENS = 1 << 31
"""Above it a `max_new_tokens` is a mistake rather than "as many as you will give me"."""

SERVE_OPTIONS = frozenset(
    {
        "num_replicas", "autoscaling_config", "max_ongoing_requests", "max_queued_requests",
        "ray_actor_options", "user_config", "graceful_shutdown_timeout_s",
        "graceful_shutdown_wait_loop_s", "health_check_period_s", "health_check_timeout_s",
        "logging_config", "request_router_config", "max_replicas_per_node",
        "placement_group_bundles", "placement_group_strategy",
    }
)  # fmt: skip
PROXY_OPTIONS = frozenset({"host", "port", "http_options", "proxy_location"})


class AppConfig(BaseModel):
    """The application's settings. Replicas, autoscaling and the like are Ray Serve's own and
    belong under `deployments:` in the same YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # ---- the model (TinyChat's words) ---------------------------------------------------------
    model_path: str = Field(
        min_length=1,
        description="The checkpoint: a folder (relative to the working directory, else to the "
        "folder that holds the `deployments` package), or a Hugging Face Hub id.",
    )
    quant_path: str | None = Field(
        None,
        description="The AWQ weights, a file or a folder; default: found inside `model_path`.",
    )
    precision: Literal["W4A16", "W16A16"] = Field(
        "W4A16", description="W4A16 reads AWQ 4-bit weights, W16A16 the 16-bit ones."
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description="The name to register; default: the last part of `model_path`. `-4bit-AWQ` "
        "is appended for W4A16, as TinyChat does.",
    )
    model_type: str = Field(
        "LLaMa",
        description="TinyChat's flag. Only LLaMa is accepted; the architecture itself is read "
        "from the checkpoint.",
    )
    conv_mode: str | None = Field(
        None,
        description="The conversation template (LLaVA's word): it writes the prompts of /v1, its "
        "tokens end answers, and FastChat's front ends ask for it. `tokenizer` is the chat "
        "template in the checkpoint. Default: the one that the model's name suggests.",
    )
    token_order: Literal["row", "column"] | None = Field(
        None,
        description="In which order mlp_downsample emits its tokens; default: as in the "
        "checkpoint's era, column for VILA-1.5, row for NVILA.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="auto takes a GPU where the cluster has one, else the CPU; cuda insists on a "
        "GPU and, on a cluster that can grow, waits for one.",
    )
    device_map: Literal["auto", "single", "balanced"] = Field(
        "auto",
        description="auto spreads a model that is larger than one GPU over as many of a machine's "
        "as it needs; single never; balanced spreads it over all of them.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto",
        description="Type of activations; auto: bfloat16 on a CPU, the checkpoint's own on a GPU.",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of the engine; default: the CPUs that Ray gives to the replica, "
        "or one for a very small model.",
    )

    # ---- the engine (vLLM's words) ------------------------------------------------------------
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt plus answer, in tokens; default: the model's own."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="How many requests run at a time; default: 64 on a GPU, 8 on a CPU.",
    )
    limit_model_concurrency: int | None = Field(
        None,
        ge=1,
        description="TinyChat's name for `max_num_seqs`; default: not set (TinyChat's is 5).",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens computed in a step; default: 2,048 on a GPU, 512 on a CPU.",
    )
    max_prefill_slowdown: float | None = Field(
        0.45,
        gt=0,
        description="By what share arriving prompts may raise the running streams' time per token, "
        "on average: the smaller, the longer new requests wait for their first token. null: no "
        "limit.",
    )
    async_scheduling: bool | None = Field(
        None,
        description="Hand a step to the device before the previous one's tokens have come back, so "
        "that the device never waits; default: on a GPU only.",
    )
    enforce_eager: bool = Field(
        False,
        description="On a GPU: capture no CUDA graphs of decode steps, which take some seconds at "
        "start and some memory.",
    )
    attention_backend: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="`triton` runs on GPUs only; auto: the fastest that runs on the device.",
    )
    block_size: int = Field(16, ge=1, description="Tokens in a block of the KV cache.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of each GPU's memory for weights and KV cache together."
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="Size of the KV cache; default on a GPU: what `gpu_memory_utilization` "
        "leaves; on a CPU: `max_num_seqs` full contexts, at most a quarter of the free memory.",
    )
    enable_prefix_caching: bool = Field(
        True, description="Reuse the KV blocks of equal beginnings, pictures included."
    )
    bf16_copy: bool | None = Field(
        None,
        description="On a CPU without AVX-512's bf16 instructions, or without a C++ compiler: keep "
        "a 16-bit copy of 4-bit weights besides, with which prompts are computed up to 2.5 times "
        "as fast. Default: where a quarter of the free memory holds it.",
    )
    image_cache_bytes: int = Field(
        256 << 20, ge=0, description="Bytes of picture embeddings that are kept for reuse."
    )

    # ---- the door -----------------------------------------------------------------------------
    max_waiting: int = Field(
        64,
        ge=0,
        description="How many requests may wait behind the `max_num_seqs` that run; the next one "
        "is refused at once.",
    )
    queue_timeout_s: float = Field(
        120.0, gt=0, description="How long a request may wait for its turn before it is given up."
    )

    # ---- requests and answers -----------------------------------------------------------------
    default_max_new_tokens: int = Field(
        256, ge=0, description="`max_new_tokens` of a request that names none."
    )
    max_new_tokens_cap: int = Field(
        1024,
        ge=1,
        lt=ANY_MAX_NEW_TOKENS,
        description="Larger `max_new_tokens` are lowered to it, silently, as TinyChat does.",
    )
    tinychat_prompt_rewrite: bool = Field(
        False,
        description="Put TinyChat's literal backslash, n and space behind every picture, as its "
        "worker does; for comparisons with it.",
    )
    max_body_bytes: int = Field(64 << 20, ge=1024, description="Largest request body.")
    body_timeout_s: float = Field(60.0, gt=0, description="How long a body may take to arrive.")
    max_images: int = Field(32, ge=0, description="Most pictures in a request.")
    max_image_bytes: int = Field(
        20 << 20, ge=1024, description="Largest picture as a file, before decoding."
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1024, description="Most pixels (width x height) in a picture."
    )
    max_image_side: int = Field(10_000, ge=32, description="Longest side of a picture, in pixels.")
    max_request_pixels: int = Field(
        100_000_000, ge=1024, description="Most pixels in all pictures of a request together."
    )
    allowed_image_hosts: list[str] = Field(
        [],
        description="Hosts from which /v1 requests may have pictures fetched by URL: names, "
        "*.example.org for those below one, or * for any. By default none is fetched. An address "
        "that is not public is reached only under a name (or address) that is listed as it is.",
    )
    image_fetch_timeout_s: float = Field(
        10.0, gt=0, description="How long all pictures of a request may take to be fetched."
    )
    sign_of_life_s: float = Field(
        2.0,
        gt=0,
        description="While nothing new comes, the last record is sent again this often; clients "
        "and proxies give up after 5 to 10 s of silence.",
    )
    max_records_per_s: float = Field(
        30.0,
        gt=0,
        description="Most records a second in a stream; tokens that come faster share a record.",
    )

    # ---- the log ------------------------------------------------------------------------------
    access_log: Literal["file", "console", "off"] = Field(
        "file",
        description="Where each request's JSON line goes: to a file of each replica beside Ray "
        "Serve's logs, to the console of `serve run`, or nowhere.",
    )
    log_content: bool = Field(
        False, description="Put prompts and answers, never pictures, into the access log."
    )

    # ---- the controller (TinyChat's words) ----------------------------------------------------
    no_register: bool = Field(False, description="Do not register with a controller.")
    controller_addr: str = Field(
        "http://localhost:21001", description="The controller to register with."
    )
    worker_addr: str = Field(
        "http://localhost:21002",
        description="The address under which the controller's clients reach this worker.",
    )
    heartbeat_interval_s: float = Field(
        15.0,
        gt=0,
        le=60,
        description="Between two heartbeats while the load stays the same; a controller forgets a "
        "worker after 30 s (LLaVA, TinyChat) or 90 s (FastChat) of silence.",
    )
    refresh_on_shutdown: bool = Field(
        False,
        description="When shutting down, have the controller poll all its workers, so that it "
        "forgets this one at once; the protocol has no better way.",
    )
    worker_id: str | None = Field(
        None, min_length=1, description="Name of this worker in logs; default: a random one."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                raise ValueError(_unknown_key(str(key), list(cls.model_fields)))
        return values

    @field_validator("model_type")
    @classmethod
    def _only_llama(cls, value: str) -> str:
        if value.lower() != "llama":
            raise ValueError(
                f"{value!r} is not supported; leave model_type out (or LLaMa), the architecture "
                "is read from the checkpoint"
            )
        return "LLaMa"

    @field_validator("conv_mode")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None and value not in TEMPLATES:
            raise ValueError(f"{value!r} is unknown; known are {', '.join(TEMPLATES)}")
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _device_by_kind(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda:"):
            raise ValueError(
                f"{value!r}: Ray chooses the GPU of each replica; use device: cuda, and "
                "CUDA_VISIBLE_DEVICES before `ray start` to keep it off the others"
            )
        return value

    @field_validator("allowed_image_hosts")
    @classmethod
    def _hosts_without_anything_else(cls, value: list[str]) -> list[str]:
        for host in value:
            if not host or set(host) & set("/@\\?# ") or not host.isprintable():
                raise ValueError(
                    f"{host!r} is no host; write its name alone, such as images.example.org"
                )
        return value

    @field_validator("controller_addr", "worker_addr")
    @classmethod
    def _http_address(cls, value: str) -> str:
        no_address = ValueError(f"{value!r} is not an address such as http://192.0.2.1:21002")
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:
            raise no_address from None
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise no_address
        if not value.isprintable() or set(value) & set("@\\ "):
            raise no_address
        if parts.query or parts.fragment:
            raise ValueError(f"{value!r}: an address has no query and no fragment")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _possible_together(self) -> AppConfig:
        if self.precision == "W16A16" and self.quant_path is not None:
            raise ValueError(
                "quant_path names AWQ weights, which precision W16A16 does not read; use "
                "precision: W4A16, or leave quant_path out"
            )
        concurrency, seqs = self.limit_model_concurrency, self.max_num_seqs
        if concurrency is not None and seqs is not None and concurrency != seqs:
            raise ValueError(
                f"limit_model_concurrency ({concurrency}) and max_num_seqs ({seqs}) are two names "
                "for one setting; keep one of them"
            )
        if self.default_max_new_tokens > self.max_new_tokens_cap:
            raise ValueError(
                f"default_max_new_tokens ({self.default_max_new_tokens}) is above "
                f"max_new_tokens_cap ({self.max_new_tokens_cap}); raise the cap or lower it"
            )
        return self

    @property
    def running_limit(self) -> int | None:
        """`max_num_seqs` by either of its names."""
        return self.max_num_seqs or self.limit_model_concurrency

    def engine_options(self) -> dict[str, Any]:
        """The part that `models.load_engine` takes as they are, less `max_num_seqs`."""
        names = (
            "max_model_len", "max_num_batched_tokens", "max_prefill_slowdown", "async_scheduling",
            "enforce_eager", "attention_backend", "block_size", "gpu_memory_utilization",
            "kv_cache_bytes", "enable_prefix_caching", "image_cache_bytes", "bf16_copy",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def _unknown_key(key: str, known: list[str]) -> str:
    if key in SERVE_OPTIONS:
        return (
            f"{key!r} is an option of Ray Serve; it belongs under `deployments:` beside "
            "`name: ModelWorker`, not under `args:`"
        )
    if key in PROXY_OPTIONS:
        return f"{key!r} belongs under `http_options:` at the top of the YAML, not under `args:`"
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
