"""The device's answers against the CPU's in float32, before anything is timed.

Answers are greedy and compared token by token. Where one differs, the CPU must have held the two
tokens for equally likely within what the dtype's rounding can do, since a tie may fall either way;
up to there, the log-probabilities of the likeliest tokens must agree within that too.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu_models import GROUP_SIZE, free_memory
from benchmarks.gpu_parts import SKIPPED, Case, Figures, Part
from benchmarks.load import make_questions
from models import SamplingParams
from models.awq.backends import BACKENDS
from models.awq.backends.base import Backend, BackendMismatch, Shape
from models.awq.quantized_weight import QuantizedWeight
from models.checkpoints.synthesis import FAMILIES, OUTPUT_FORMATS, synthesize
from models.checkpoints.synthesis.weights import RandomWeights
from models.demo import DEMO_CHECKPOINT, simple_scene
from models.engine.core import EngineCore
from models.engine.messages import GenerationRequest, TokenLogprobs
from models.engine.preparation import RequestPreparer
from models.loading import LoadedCore, load_core

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
ON_CPU = ("float32", "bfloat16")
"""CPUs are not served in float16."""
TOLERANCE = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.3}
"""Of log-probabilities, absolute. The tiny models' logits spread by some 10; a rounding to 8 bits
in a handful of layers comes to a few hundredths of that."""
PRODUCT_TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
"""Of a layer's outputs, relative to the largest."""
SHAPES = ((768, 256), (256, 384), (1024, 256), (512, 1024), (12288, 4096), (4096, 11008))
"""(N, K): the tiny models', the demo's and a 7B's."""
TINY_SHAPES = 4
LARGE = 1 << 24
"""Weights; such layers are tried in groups of 128 only."""
ROWS = (1, 2, 3, 8, 16, 17, 33, 64, 65, 300)
"""On both sides of every number from which a backend is likely to do something else."""
GROUPS = (32, 64, 128)
ANSWER = 12
REPEATS = 3
FORMATS = ("llm-awq-v1", "llm-awq-v0", "autoawq", "compressed-tensors", "compressed-tensors-sym")
"""Besides those that every family is written in."""
LAYOUTS = {"llava": "llava-v1.5-7b", "vila": "vila1.5-3b", "hf": "llava-1.5-7b-hf"}
"""A family of each."""
SMALL: dict[str, Any] = {
    "max_num_seqs": 4, "max_model_len": 512, "kv_cache_bytes": 16 << 20,
    "max_prefill_slowdown": None,  # which would make chunks as long as earlier steps took
}  # fmt: skip
KINDS = (
    "demo", "NaN in unused KV blocks", "large values in unused KV blocks", "repeated runs",
    "company", "family", "format",
)  # fmt: skip
"""Beginnings of the cases' names."""
LARGE_FINITE = 3e4
"""Nearly fp16's largest: what stale blocks can hold at most."""


class Disagreement(AssertionError):
    """An answer that is not the reference's."""


@dataclass(frozen=True)
class Spoken:
    """One answer, token by token."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]


def speak(
    core: EngineCore, requests: Sequence[GenerationRequest], company: bool = True
) -> list[Spoken]:
    """Answers of all at once, or of one after the other, without a thread: the same steps each
    time."""
    spoken = {request.request_id: Spoken([], []) for request in requests}
    for group in [requests] if company else [[request] for request in requests]:
        for request in group:
            core.add(request)
        while core.has_work:
            for delta in core.step():
                if delta.error is not None:
                    raise delta.error
                spoken[delta.request_id].tokens.extend(delta.token_ids)
                spoken[delta.request_id].logprobs.extend(delta.logprobs)
    core.check_integrity()
    return [spoken[request.request_id] for request in requests]


def compare(expected: Spoken, got: Spoken, tolerance: float) -> float:
    """The largest difference of log-probabilities, up to the first token that is not the same.

    Raises:
        Disagreement: it is above the tolerance, or that token was no tie.
    """
    worst = 0.0
    for place, (one, other) in enumerate(zip(expected.logprobs, got.logprobs, strict=True)):
        theirs = dict(other.top)
        differences = [abs(value - theirs[token]) for token, value in one.top if token in theirs]
        if not differences:
            raise Disagreement(f"token {place}: none of the likeliest is the same")
        for difference in differences:
            if not difference <= tolerance:  # a NaN fails too
                raise Disagreement(
                    f"token {place}: log-probabilities differ by {difference:.4g}, more than "
                    f"{tolerance}"
                )
        worst = max(worst, *differences)
        if one.token_id != other.token_id:
            gap = one.logprob - dict(one.top).get(other.token_id, -math.inf)
            if gap > 2 * tolerance:
                raise Disagreement(
                    f"token {place}: {other.token_id}, not {one.token_id}, which was likelier by "
                    f"{gap:.4g}"
                )
            break
    return worst


def compare_all(expected: Sequence[Spoken], got: Sequence[Spoken], tolerance: float) -> Figures:
    worst = max(compare(*pair, tolerance) for pair in zip(expected, got, strict=True))
    same = sum(one.tokens == other.tokens for one, other in zip(expected, got, strict=True))
    return {"difference": worst, "equal answers": f"{same} of {len(expected)}"}


def check_product(
    backend: Backend, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype
) -> dict[int, float]:
    """By the number of rows: the largest error over the largest output, against a product in
    float64 of (q - zero) * scale.

    Raises:
        BackendMismatch: the backend refuses the layer.
        Disagreement: a row depends on memory that is not its own.
    """
    groups = weight.q.to(device).double().unflatten(1, (-1, weight.group_size))
    scale = weight.scale.to(device, dtype).double()[..., None]
    exact = ((groups - weight.zero.to(device).double()[..., None]) * scale).flatten(1)
    packed, shape = backend.pack(weight, device, dtype), Shape.of(weight)
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for rows in ROWS:
        x = torch.randn(rows, shape.in_features, generator=generator).to(device, dtype)
        # Rows that nobody should look at lie behind the real ones.
        poisoned = x.new_full((rows + 8, shape.in_features), torch.nan)
        poisoned[:rows] = x
        poison_free_memory(device)
        got = backend.matmul(poisoned[:rows], packed, shape).double()
        wanted: Tensor = x.double() @ exact.t()
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if math.isnan(error):
            raise Disagreement(f"{rows} rows of {shape}: not a number")
        errors[rows] = error
    return errors


def poison_free_memory(device: torch.device) -> None:
    """What is allocated next and not written holds NaNs, be it small or large: torch takes small
    tensors from pages of their own."""
    if device.type == "cuda":
        held = [torch.full((1 << 24,), torch.nan, device=device)]
        held += [torch.full((1 << 17,), torch.nan, device=device) for _ in range(16)]
        del held


class CorrectnessPart(Part):
    name = "correctness"
    seconds = 180.0
    environment: ClassVar = {"TINYCHAT_W4A16_SECONDS": "0"}  # these layers' speeds are no matter

    def cases(self) -> Mapping[str, Case]:
        cases: dict[str, Case] = {}
        dtypes = DTYPES if self.setting.is_gpu else ON_CPU
        for precision in ("W4A16", "W16A16"):
            for dtype in dtypes:
                cases[f"demo, {precision}, {dtype}"] = (
                    lambda precision=precision, dtype=dtype: self._demo(precision, dtype)
                )  # fmt: skip
        for dtype in dtypes:
            cases |= {
                f"NaN in unused KV blocks, {dtype}": lambda dtype=dtype: self._poison(
                    dtype, torch.nan
                ),
                f"large values in unused KV blocks, {dtype}": lambda dtype=dtype: self._poison(
                    dtype, LARGE_FINITE
                ),
                f"repeated runs, {dtype}": lambda dtype=dtype: self._repeated(dtype),
                f"company, {dtype}": lambda dtype=dtype: self._company(dtype),
            }
        for name in BACKENDS:
            for dtype in dtypes:
                cases[f"backend {name}, {dtype}"] = (
                    lambda name=name, dtype=dtype: self._backend(BACKENDS[name], dtype)
                )  # fmt: skip
        for family in FAMILIES:
            cases[f"family {family}"] = lambda family=family: self._family(family)
        for layout, family in LAYOUTS.items():
            for form in FORMATS:
                if layout == "hf" and form.startswith("llm-awq"):
                    continue  # those are no files of transformers' layout
                cases[f"format {form}, layout {layout}"] = (
                    lambda family=family, form=form: self._format(family, form)
                )  # fmt: skip
        return cases

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        yield "| backend, dtype | layers | largest error |"
        yield "|---|---:|---:|"
        for name, own in cases.items():
            if "layers" in own:
                backend = name.removeprefix("backend ")
                yield f"| {backend} | {own['layers']} | {own['largest']:.2g} |"
        yield ""
        yield "| what | cases | largest difference of log-probabilities |"
        yield "|---|---:|---:|"
        for kind in KINDS:
            differences = [
                difference
                for name, own in cases.items()
                if name.startswith(kind)
                for difference in _differences(own)
            ]
            count = sum(name.startswith(kind) for name in cases)
            worst = f"{max(differences):.2g}" if differences else "-"
            if count:
                yield f"| {kind} | {count} | {worst} |"

    # ---- the cases --------------------------------------------------------------------------

    def _backend(self, backend: Backend, dtype: str) -> Figures:
        kind, worst, refusals, layers = DTYPES[dtype], 0.0, set(), 0
        shapes = SHAPES if self.setting.scale == "full" else SHAPES[:TINY_SHAPES]
        for n, k in shapes:
            for group in GROUPS if n * k < LARGE else (GROUP_SIZE,):
                reason = backend.unsupported(Shape(n, k, group), self.setting.device, kind)
                if reason is not None:
                    refusals.add(reason)
                    continue
                weight = RandomWeights(0, group).quantized(f"{n} {k}", n, k)
                try:
                    errors = check_product(backend, weight, self.setting.device, kind)
                except BackendMismatch as mismatch:
                    raise Disagreement(f"{n} x {k}, groups of {group}: {mismatch}") from mismatch
                layers += 1
                worst = max(worst, *errors.values())
                if worst > PRODUCT_TOLERANCE[dtype]:
                    raise Disagreement(f"{n} x {k}, groups of {group}: {errors}")
        if not layers:
            return {SKIPPED: "; ".join(sorted(refusals))}
        return {"largest": worst, "layers": layers, "refused": sorted(refusals)}

    def _demo(self, precision: str, dtype: str) -> Figures:
        reference = self._load(DEMO_CHECKPOINT, precision, "float32", "cpu")
        loaded = self._load(DEMO_CHECKPOINT, precision, dtype)
        requests = demo_requests(loaded)
        return compare_all(
            speak(reference.core, requests), speak(loaded.core, requests), TOLERANCE[dtype]
        )

    def _poison(self, dtype: str, value: float) -> Figures:
        """Blocks that no request has written yet hold `value`; what is attended to must not."""
        clean = self._load(DEMO_CHECKPOINT, "W4A16", dtype)
        poisoned = self._load(DEMO_CHECKPOINT, "W4A16", dtype)
        cache = poisoned.core.runner.cache
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(value)
        poison_free_memory(self.setting.device)
        requests = demo_requests(clean)
        return _bit_equal(speak(clean.core, requests), speak(poisoned.core, requests))

    def _repeated(self, dtype: str) -> Figures:
        loaded = self._load(DEMO_CHECKPOINT, "W4A16", dtype, enable_prefix_caching=False)
        requests = demo_requests(loaded)
        first = speak(loaded.core, requests)
        figures: Figures = {}
        for _ in range(REPEATS):
            poison_free_memory(self.setting.device)
            figures = _bit_equal(first, speak(loaded.core, requests))
        return figures

    def _company(self, dtype: str) -> Figures:
        loaded = self._load(DEMO_CHECKPOINT, "W4A16", dtype, enable_prefix_caching=False)
        requests = demo_requests(loaded)
        alone = speak(loaded.core, requests, company=False)
        return compare_all(alone, speak(loaded.core, requests), TOLERANCE[dtype])

    def _family(self, family: str) -> Figures:
        folder = self._tiny(family, ("16bit", "llm-awq-v2"))
        figures: Figures = {}
        for precision in ("W4A16", "W16A16"):
            figures[precision] = self._tiny_answers(folder, precision, ("float32", "auto"))
        return figures

    def _format(self, family: str, form: str) -> Figures:
        return self._tiny_answers(self._tiny(family, (form,)), "W4A16", ("float32",))

    # ---- what they use ----------------------------------------------------------------------

    def _tiny(self, family: str, formats: tuple[str, ...]) -> Path:
        for form in formats:
            OUTPUT_FORMATS[form]
        folder = self.setting.models / "-".join((family, "tiny", *formats))
        shutil.rmtree(folder, ignore_errors=True)
        synthesize(family, folder, formats=formats, group_size=GROUP_SIZE)
        return folder

    def _tiny_answers(self, folder: Path, precision: str, dtypes: Sequence[str]) -> Figures:
        reference = self._load(folder, precision, "float32", "cpu")
        requests = tiny_requests(reference)
        expected = speak(reference.core, requests)
        figures: Figures = {}
        for dtype in dtypes:
            loaded = self._load(folder, precision, dtype)
            used = loaded.model.description["dtype"]
            figures[used] = compare_all(expected, speak(loaded.core, requests), TOLERANCE[used])
        return figures

    def _load(
        self, folder: Path, precision: str, dtype: str, device: str | None = None, **options: Any
    ) -> LoadedCore:
        free_memory(self.setting)
        return load_core(
            folder, None, precision,  # type: ignore[arg-type]
            device=device or self.setting.kind, dtype=dtype, **{**SMALL, **options},
        )  # fmt: skip


def _differences(figures: Figures) -> Iterator[float]:
    """All that a case has found, however deep."""
    for key, value in figures.items():
        if key == "difference":
            yield value
        elif isinstance(value, dict):
            yield from _differences(value)


def _bit_equal(expected: Sequence[Spoken], got: Sequence[Spoken]) -> Figures:
    if any(one != other for one, other in zip(expected, got, strict=True)):
        raise Disagreement("not equal to the last bit")
    return {"equal answers": f"{len(got)} of {len(expected)}"}


def demo_requests(loaded: LoadedCore) -> list[GenerationRequest]:
    """Of different lengths, with no picture, one and two, more than run at a time."""
    red, blue = simple_scene("red", "circle"), simple_scene("blue", "square")
    questions = [(question.prompt, [red]) for question in make_questions(0, 4)]
    questions += [
        ("USER: <image>\n<image>\nWhich of them is blue? ASSISTANT:", [red, blue]),
        ("USER: Hello. ASSISTANT:", []),
        ("USER: " + "How many objects are there? " * 9 + "ASSISTANT:", []),
    ]
    return _requests(loaded, questions)


def tiny_requests(loaded: LoadedCore) -> list[GenerationRequest]:
    """A wide picture, a high one, and none."""
    wide, high = (
        Image.effect_noise(size, 90).convert("RGB") for size in ((60, 32), (32, 60))
    )  # fmt: skip
    questions = [
        ("USER: <image>\nWhat is this? ASSISTANT:", [wide]),
        ("USER: <image>\nAnd what is that, in a few words more? ASSISTANT:", [high]),
        ("USER: Hello. ASSISTANT:", []),
    ]
    return _requests(loaded, questions)


def _requests(
    loaded: LoadedCore, questions: Sequence[tuple[str, Sequence[Image.Image]]]
) -> list[GenerationRequest]:
    model = loaded.model
    preparer = RequestPreparer(
        model.spec, loaded.tokenizer, model.preprocessor, model.max_model_len
    )  # fmt: skip
    return [
        preparer.prepare(
            prompt, pictures,
            SamplingParams(
                temperature=0, max_new_tokens=ANSWER + number % 3, ignore_eos=True, logprobs=8
            ),
            request_id=f"question {number}",
        )
        for number, (prompt, pictures) in enumerate(questions)
    ]  # fmt: skip
