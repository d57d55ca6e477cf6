"""Muon for the matrices inside the layers, AdamW for all the rest.

Muon (Jordan et al., 2024) makes the momentum of a matrix orthogonal before it is applied; its
updates are scaled to AdamW's size, as in "Muon is Scalable for LLM Training" (Liu et al., 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
RMS = 0.2
"""Of an AdamW update, about."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """(B, N, K) -> the nearest matrices of orthonormal rows or columns, roughly, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum 0.95, Nesterov's. Matrices of one shape are worked on together."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self._groups[parameter.shape].append(parameter)
        self._averages = {
            shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, rates: dict[nn.Parameter, float]) -> None:
        """
        Args:
            rates: the learning rate of each parameter; those without a gradient are left out.
        """
        for shape, group in self._groups.items():
            if any(parameter.grad is None for parameter in group):
                continue
            gradients = torch.stack([_gradient(parameter) for parameter in group])
            average = self._averages[shape]
            average.lerp_(gradients, 1 - self._momentum)
            updates = orthogonalised(gradients.lerp_(average, self._momentum)).float()
            scale = RMS * max(shape) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.sub_(update, alpha=scale * rates[parameter])


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class Optimizer:
    """Muon and AdamW on one network, by one schedule."""

    def __init__(
        self, network: nn.Module, *, muon_rate: float, adam_rate: float, tower_factor: float = 1.0
    ) -> None:
        """
        Args:
            tower_factor: of the tower's rates.
        """
        self._rates: dict[nn.Parameter, float] = {}
        matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        others: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in network.named_parameters():
            in_tower = name.startswith("tower.")
            inside = ".layers." in f".{name}" and parameter.ndim == 2
            (matrices if inside else others)[in_tower].append(parameter)
            factor = tower_factor if in_tower else 1.0
            self._rates[parameter] = factor * (muon_rate if inside else adam_rate)
        self._muons = [Muon(group) for group in matrices.values() if group]
        self._adam = torch.optim.AdamW(
            [
                {"params": group, "rate": self._rates[group[0]]}
                for group in others.values()
                if group
            ],
            lr=adam_rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True,
        )  # fmt: skip

    def step(self, share: float) -> None:
        """
        Args:
            share: of the peak rates, by the schedule.
        """
        rates = {parameter: share * rate for parameter, rate in self._rates.items()}
        for muon in self._muons:
            muon.step(rates)
        for group in self._adam.param_groups:
            group["lr"] = share * group["rate"]
        self._adam.step()
