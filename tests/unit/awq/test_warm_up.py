"""Every kind of 4-bit layer runs once for each number of rows before a server is ready."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from models.awq import W4A16Linear, quantize_rtn, warm_up_linears

CPU = torch.device("cpu")


def layer(n: int, k: int) -> W4A16Linear:
    return W4A16Linear.from_quantized(
        quantize_rtn(torch.randn(n, k), 32), None, backend="reference", device=CPU,
        dtype=torch.float32,
    )  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int, int]]:
    runs: Counter[tuple[int, int, int]] = Counter()
    forward = W4A16Linear.forward

    def watched(self: W4A16Linear, x: Tensor) -> Tensor:
        n, k, _ = self.shape
        runs[n, k, x.shape[0]] += 1
        return forward(self, x)

    monkeypatch.setattr(W4A16Linear, "forward", watched)
    return runs


def test_one_layer_of_each_kind_runs_for_every_number_of_rows(
    seen: Counter[tuple[int, int, int]],
) -> None:
    model = nn.ModuleList([layer(16, 32), nn.Linear(4, 4), layer(16, 32), layer(32, 64)])
    warm_up_linears(model, torch.float32, 12, device_type="cpu")
    assert seen == {(n, k, rows): 1 for n, k in [(16, 32), (32, 64)] for rows in (1, 2, 4, 8, 16)}


def test_layers_of_a_cpu_need_none(seen: Counter[tuple[int, int, int]]) -> None:
    warm_up_linears(layer(16, 32), torch.float32, 4096)
    assert not seen
