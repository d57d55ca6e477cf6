"""What `benchmarks.gpu` computes from what it has measured, and how it judges answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks import gpu_peers
from benchmarks.gpu_correctness import Disagreement, Spoken, check_product, compare
from benchmarks.gpu_decode import DecodePart
from benchmarks.gpu_limits import Limits, ModelCost, Work
from benchmarks.gpu_parts import Setting
from benchmarks.gpu_step import PHASES, StepPart, covered, timed_steps
from benchmarks.streams import ask, noise
from models.awq.backends.reference import Reference
from models.awq.formats.llm_awq_v2 import unpack
from models.checkpoints import open_checkpoint
from models.checkpoints.synthesis import FAMILIES, synthesize
from models.checkpoints.synthesis.components import language_values, tower_config
from models.checkpoints.synthesis.weights import RandomWeights
from models.engine.messages import GenerationDelta, TokenLogprobs, Usage
from tests.unit.engine.harness import build_core, request

H200 = Limits(4.3e12, 4.0e12, {"bfloat16": 7e14, "float16": 6e14})


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> ModelCost:
    """LLaVA-1.5-7B's, of a tiny checkpoint with the real one's configs."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    synthesize("llava-v1.5-7b", folder, formats=["llm-awq-v2"])
    spec, family = open_checkpoint(folder).spec, FAMILIES["llava-v1.5-7b"]
    return ModelCost.of(
        replace(
            spec,
            language=LlamaConfig(**language_values(family, 32000)),  # type: ignore[arg-type]
            vision=replace(spec.vision, config=tower_config(family)),
            projector=replace(spec.projector, in_features=1024, out_features=4096),
        )
    )


def test_a_7bs_step_reads_what_was_computed_by_hand(cost: ModelCost) -> None:
    """3.36 GB of linears, 0.26 of the head, 0.524 MB of keys and values for each token: the
    issue's limit of 1,083 tokens per second at 4.3 TB/s and 640 tokens of context."""
    assert cost.weight_bytes == pytest.approx(3.63e9, rel=2e-3)
    assert cost.kv_bytes == 2 * 32 * 4096 * 2
    assert 1 / cost.decode(1, 640).seconds(H200) == pytest.approx(1083, rel=5e-3)


def test_a_7bs_operations_are_those_of_its_products(cost: ModelCost) -> None:
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    decode = cost.decode(3, 100).num_ops
    attention = 2 * 2 * 32 * 4096  # a query with a key, a weight with a value
    assert decode == 3 * (2 * (weights + 32000 * 4096) + 100 * attention)
    tower, projector, prompt = cost.first_token(10, 2)
    layer = 4 * 1024**2 + 2 * 1024 * 4096  # and 23 of 24 are used
    assert tower.num_ops == 2 * 577 * 23 * (2 * layer + 2 * 2 * 577 * 1024)
    assert projector.num_ops == 2 * 2 * 576 * (1024 * 4096 + 4096**2)
    assert prompt.num_ops == 2 * (10 * weights + 32000 * 4096) + 55 * attention


def test_the_slower_of_reading_and_computing_counts() -> None:
    limits = Limits(100.0, 200.0, {"bfloat16": 10.0, "float16": 5.0})
    assert Work(400.0, 10.0).seconds(limits) == 2.0
    assert Work(400.0, 50.0).seconds(limits) == 5.0


def spoken(*tokens: tuple[int, float], top: dict[int, float] | None = None) -> Spoken:
    """Tokens with their log-probabilities, and the same likeliest ones at every place."""
    return Spoken(
        [token for token, _ in tokens],
        [TokenLogprobs(t, p, tuple((top or {t: p}).items())) for t, p in tokens],
    )


def test_answers_agree_up_to_a_tie() -> None:
    expected = spoken((5, -1.0), (5, -1.0), top={5: -1.0, 7: -1.05})
    same = spoken((5, -1.02), (5, -1.0), top={5: -1.02, 7: -1.05})
    assert compare(expected, same, 0.1) == pytest.approx(0.02)
    tie = spoken((5, -1.0), (7, -1.0), top={5: -1.03, 7: -1.0})
    assert compare(expected, tie, 0.1) == pytest.approx(0.05)
    with pytest.raises(Disagreement, match="token 1: 7, not 5, which was likelier by 0.05"):
        compare(expected, spoken((5, -1.0), (7, -1.0), top={5: -1.0, 7: -1.05}), 0.02)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({5: -1.3, 7: -1.05}, "token 0: log-probabilities differ by 0.3"),
        ({5: float("nan"), 7: -1.05}, "token 0: log-probabilities differ by nan"),
        ({5: -1.0, 7: float("nan")}, "token 0: log-probabilities differ by nan"),
        ({8: -1.0, 9: -1.0}, "none of the likeliest is the same"),
    ],
)
def test_what_is_no_rounding_is_a_disagreement(top: dict[int, float], message: str) -> None:
    expected = spoken((5, -1.0), top={5: -1.0, 7: -1.05})
    with pytest.raises(Disagreement, match=message):
        compare(expected, spoken((5, -1.0), top=top), 0.1)


class Overreading(Reference):
    """Looks at the row behind its last one, which holds NaNs."""

    def matmul(self, x: Tensor, packed: Any, shape: Any) -> Tensor:
        beyond = x.as_strided((x.shape[0] + 1, x.shape[1]), x.stride())
        return super().matmul(x, packed, shape) + 0 * beyond[-1].sum()


def test_a_product_is_held_against_the_formula() -> None:
    weight, cpu = RandomWeights(0, 32).quantized("x", 32, 64), torch.device("cpu")
    assert max(check_product(Reference(), weight, cpu, torch.float32).values()) < 1e-5
    with pytest.raises(Disagreement, match="not a number"):
        check_product(Overreading(), weight, cpu, torch.float32)


def test_time_that_several_kernels_cover_counts_once() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (2.5, 2.75)]) == 4
    assert covered([]) == 0


def test_a_steps_phases_make_up_the_step() -> None:
    core = build_core(budget=64)
    for name in ("a", "b"):
        core.add(request(name, range(2, 12), max_new_tokens=40, ignore_eos=True))
    core.step()
    phases = timed_steps(core, 8)
    assert set(phases) == {*PHASES, "rest"}
    assert all(milliseconds >= 0 for milliseconds in phases.values())
    assert phases["run"] > phases["lay out"] > 0
    core.step()  # and it is as it was


class LlmAwq:
    """Stands for llm-awq's two kernels, on the CPU."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k, self.rows = n, k, dict[int, str]()

    def gemv_forward_cuda_new(
        self, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, m: int, n: int, k: int,
        group: int,
    ) -> Tensor:  # fmt: skip
        assert (m, n, k, group) == (len(x), self.n, self.k, 128)
        return self.product("gemv", x, qweight, scales, zeros)

    def gemm_forward_cuda_new(self, x: Tensor, *tensors: Tensor) -> Tensor:
        return self.product("gemm", x, *tensors)

    def product(self, kernel: str, x: Tensor, *tensors: Tensor) -> Tensor:
        self.rows[len(x)] = kernel
        weight = unpack(*tensors, 128, self.k)
        return (x.float() @ weight.dequantize(torch.float32).t()).half()


def test_llm_awqs_kernels_are_called_as_it_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "LAYERS", {"small": (64, 256)})
    monkeypatch.setattr(gpu_peers, "ROWS", (1, 7, 8))
    kernels = LlmAwq(64, 256)
    figures = gpu_peers.measure_llm_awq(kernels, torch.device("cpu"))
    assert kernels.rows == {1: "gemv", 7: "gemv", 8: "gemm"}
    assert list(figures["ms"]) == ["1", "7", "8"] and figures["largest error"] < 2e-3
    monkeypatch.setattr(LlmAwq, "product", lambda *_: torch.full((1, 64), torch.nan))
    with pytest.raises(AssertionError, match="small, 1 rows"):
        gpu_peers.measure_llm_awq(kernels, torch.device("cpu"))


class Talking:
    """An engine that gives each stream a token at a time."""

    def __init__(self, late: float) -> None:
        self.late = late
        self.streams = 0

    async def stream(self, prompt: str, images: Any, params: Any) -> AsyncIterator[GenerationDelta]:
        self.streams += 1
        await asyncio.sleep(self.late * (self.streams - 1))
        for count in range(1, params.max_new_tokens + 1):
            await asyncio.sleep(0.01)
            yield GenerationDelta("r", token_ids=(3,), usage=Usage(100, count))


def test_streams_are_counted_while_all_run() -> None:
    engine: Any = Talking(late=0.0)
    answered = asyncio.run(ask(engine, noise(2), 6))
    assert len(answered.first_token_s) == 2 and answered.prompt_tokens == 100
    assert 101 <= answered.context <= 105
    with pytest.raises(RuntimeError, match="2 tokens ended before the last one began"):
        engine = Talking(late=0.3)
        asyncio.run(ask(engine, noise(2), 2))


def test_models_are_measured_beside_transformers_and_their_limits(tmp_path: Path) -> None:
    setting = Setting("cpu", "tiny", tmp_path, tmp_path)
    part = DecodePart(setting)
    cases = {
        name: case() for name, case in part.cases().items() if name.startswith("vila1.5-3b")
    }  # fmt: skip
    part.close()
    one = cases["vila1.5-3b, 1 stream"]
    assert one["share of limit"] == pytest.approx(one["tokens_per_s"] / one["limit"])
    first = cases["vila1.5-3b, first token"]
    assert 0 < first["prepare_s"] < first["first_token_s"]
    assert 64 <= first["prompt_tokens"] - 16 <= 72  # behind the picture's 16 positions
    table = "\n".join(part.lines(cases))
    assert table.count("| vila1.5-3b | ") == 3
    renamed = {
        name.replace("vila1.5-3b", "llava-v1.5-7b"): {**own, "share of limit": 0.5}
        for name, own in cases.items()
    }
    judged = {goal.text: goal.is_met for goal in part.goals(renamed)}
    assert judged["llava-v1.5-7b, one stream / limit"]
    assert not judged["llava-v1.5-7b, 4 streams / limit"]


def test_a_step_is_measured_on_a_real_engine(tmp_path: Path) -> None:
    part = StepPart(Setting("cpu", "tiny", tmp_path, tmp_path))
    (name, case), *_ = part.cases().items()
    figures = case()
    assert figures["kernels_ms"] and 0 <= figures["idle share"] <= 1
    assert "| 1 | " in "\n".join(part.lines({name: figures}))
