"""A linear layer with 4-bit weights and 16-bit (or fp32) activations."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from models.awq.backends import BACKENDS, CHOICE
from models.awq.backends.base import Backend, BackendMismatch, Packed, Shape
from models.awq.backends.cuda import choose
from models.awq.quantized_weight import QuantizedWeight

logger = logging.getLogger(__name__)
_warned: set[str] = set()


class W4A16Linear(nn.Module):
    """y = x W^T + b, W in 4 bits. Inference only; made by `from_quantized`.

    Attributes:
        backend: the name of the backend that computes it, which is not the one that was asked
            for where that one cannot, or where the choice was left to the layer.
    """

    bias: Tensor | None

    def __init__(
        self, name: str, backend: Backend, shape: Shape, packed: Packed, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.backend = name
        self.shape = shape
        self._backend = backend
        self._buffer_names = {key: f"packed_{key}" for key in packed}
        for key, value in packed.items():
            self.register_buffer(f"packed_{key}", value)
        self.register_buffer("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> W4A16Linear:
        """
        Args:
            weight: (N, K).
            bias: (N,), or None.
            backend: see `models.awq.backends`. One that cannot do this layer is replaced by the
                reference, with a warning once for each reason. `CHOICE` stands for whichever is
                fastest, which is measured where it is not known.
            dtype: of the activations.

        Raises:
            ConfigurationError: there is no backend of that name.
        """
        shape = Shape.of(weight)
        name, chosen, packed = _pack(backend, shape, weight, device, dtype)
        bias = None if bias is None else bias.to(device, dtype)
        return cls(name, chosen, shape, packed, bias)

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next(self.buffers()).device

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        packed = {name: getattr(self, buffer) for name, buffer in self._buffer_names.items()}
        y = self._backend.matmul(x.reshape(-1, self.in_features), packed, self.shape)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        n, k, group = self.shape
        return f"in_features={k}, out_features={n}, group_size={group}, backend={self.backend!r}"


def _pack(
    wanted: str,
    shape: Shape,
    weight: QuantizedWeight,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str, Backend, Packed]:
    """(name, backend, buffers) of the first that can do the layer."""
    if wanted == CHOICE:
        alternatives = choose(shape, device, dtype)
    else:
        alternatives = [(wanted, BACKENDS[wanted])]
    for name, backend in alternatives:
        problem = backend.unsupported(shape, device, dtype)
        if problem is None:
            try:
                return name, backend, backend.pack(weight, device, dtype)
            except BackendMismatch as mismatch:
                problem = str(mismatch)
        if f"{name}: {problem}" not in _warned:
            _warned.add(f"{name}: {problem}")
            logger.warning(
                "the %s backend cannot do a layer (%s); a slower one does it", name, problem
            )
    reference = BACKENDS["reference"]
    return "reference", reference, reference.pack(weight, device, dtype)
