"""Steps that are captured once and replayed: the same answers, whatever comes and goes.

Without a GPU a capture is the computation itself, held to what a graph does: it reads and writes
the same memory each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.engine import decode_graphs
from models.engine.core import EngineCore
from models.engine.decode_graphs import Capture, DecodeGraphs, capture_decodes, graph_sizes
from models.engine.scheduler import Batch, Chunk
from models.language.paged_batch import PagedBatch
from tests.unit.engine.harness import (
    BLOCK,
    Picture,
    alone,
    answers,
    build_core,
    decoder,
    request,
    run_all,
)  # fmt: skip
from tests.unit.gpu.device import DEVICE, needs_gpu


class Captures:
    """Computations that are replayed into the memory of their first result."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.inference_mode():
            out = compute()

        def replay() -> Tensor:
            self.num_replays += 1
            out.copy_(compute())
            return out

        return replay


def core_with_graphs(
    capture: Capture, *, seqs: int = 3, async_scheduling: bool = True
) -> EngineCore:
    core = build_core(seqs=seqs, async_scheduling=async_scheduling, max_len=64)
    runner = core.runner
    runner.attention = PagedBatch
    runner.graphs = DecodeGraphs(
        runner.decoder, runner.cache, capture, max_rows=seqs, max_tokens=64
    )
    return core


def test_there_is_a_graph_for_each_power_of_two_and_for_all() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's; the GPU's is below")
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_answers_are_the_same_from_graphs(async_scheduling: bool) -> None:
    """Of one to three sequences in padded batches, with pictures, and of different lengths."""
    captures = Captures()
    core = core_with_graphs(captures, async_scheduling=async_scheduling)
    reqs = [
        request("short", [4, 5], max_new_tokens=2, ignore_eos=True),
        request("picture", range(2, 14), [(3, Picture(b"\x01", 6))], max_new_tokens=5),
        request("drawn", [9], max_new_tokens=6, temperature=1.0, seed=3, logprobs=1),
    ]
    for req in reqs:
        core.add(req)
    assert answers(run_all(core)) == {req.request_id: alone(req) for req in reqs}
    assert captures.num_replays >= 4


def test_only_single_tokens_that_are_no_pictures_go_through_a_graph() -> None:
    core = build_core()
    with torch.inference_mode():
        graphs = DecodeGraphs(
            decoder(), core.runner.cache, lambda compute: compute, max_rows=2, max_tokens=8
        )

    def chunk(start: int, end: int, samples: bool = True) -> Chunk:
        core.add(request("r", range(2, 10), [(3, Picture(b"\x01", 2))]))
        return Chunk(core.scheduler.waiting.pop(), start, end, samples)

    assert graphs.can_run(Batch([chunk(7, 8), chunk(5, 6)]))
    assert not graphs.can_run(Batch([chunk(7, 8)] * 3)), "more rows than the largest graph has"
    assert not graphs.can_run(Batch([chunk(6, 8)])), "a prompt"
    assert not graphs.can_run(Batch([chunk(7, 8, samples=False)])), "a piece of a prompt"
    assert not graphs.can_run(Batch([chunk(4, 5)])), "a picture's last position"


def test_what_cannot_be_captured_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: torch.device) -> Capture:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graphs, "cuda_capture", refuse)
    with caplog.at_level(logging.WARNING):
        graphs = capture_decodes(decoder(), build_core().runner.cache, max_rows=2, max_tokens=BLOCK)
    assert graphs is None and "not permitted" in caplog.text


@needs_gpu
def test_captured_graphs_give_the_cpus_answers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The tiny model in float32, whose answers do not depend on the order of its sums."""
    from models import SamplingParams, load_engine
    from tests.tiny import write_tiny_llava

    folder = write_tiny_llava(tmp_path / "tiny")
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
    prompts = [(f"USER: {'word ' * i}? ASSISTANT:", ()) for i in range(1, 6)]
    said = {}
    for device, eager in (("cpu", True), ("cuda", True), ("cuda", False)):
        with load_engine(
            folder, precision="W16A16", device=device, dtype="float32", max_num_seqs=5,
            enforce_eager=eager,
        ) as engine:  # fmt: skip
            assert (engine.description()["cuda_graphs"] == "none") is eager
            said[device, eager] = engine.generate_batch(prompts, params)
    assert said["cpu", True] == said["cuda", True] == said["cuda", False]
