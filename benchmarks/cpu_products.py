"""The products that `benchmarks.cpu_peers` compares: y = x W^T, each in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ggml import Ggml
from models.awq import QuantizedWeight
from models.awq.backends import BACKENDS
from models.awq.backends.base import Shape

CPU = torch.device("cpu")
OUR_BACKENDS = ("cpu_native", "cpu_int4", "cpu_int4_bf16")
GGML_TYPES = ("Q4_0", "Q4_K")
ONNX_LEVELS = {1: "onnxruntime fp32", 4: "onnxruntime int8"}
"""MatMulNBits' accuracy_level: what it computes in."""


class Product(ABC):
    """One linear.

    Attributes:
        num_bytes: of its weights, all that one row reads.
        same_weights: it multiplies with the very weights that it was given in 4 bits.
    """

    num_bytes: int
    same_weights = False

    @abstractmethod
    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        """x: (M, K) bf16 -> what computes (M, N), in any floating-point type."""


Maker: TypeAlias = Callable[[Tensor, QuantizedWeight], Product]
"""From the weight in fp32 and in 4 bits."""


def arms(ggml: Path | None, threads: int, group: int) -> dict[str, Maker]:
    """Those that this machine has, by name."""
    found: dict[str, Maker] = {}
    shape = Shape(64, group, group)
    for backend in OUR_BACKENDS:
        if BACKENDS[backend].unsupported(shape, CPU, torch.bfloat16) is None:
            found[backend] = lambda _, quantized, backend=backend: Ours(backend, quantized)
    found["torch bf16"] = lambda weight, _: Wide(weight)
    if ggml:
        library = Ggml(ggml, threads)
        for kind in GGML_TYPES:
            found[f"ggml {kind}"] = lambda weight, _, kind=kind: GgmlProduct(library, kind, weight)
    if find_spec("onnxruntime") and find_spec("onnx"):
        for level, name in ONNX_LEVELS.items():
            found[name] = lambda _, quantized, level=level: Onnx(quantized, level, threads)
    return found


class Ours(Product):
    same_weights = True

    def __init__(self, backend: str, weight: QuantizedWeight) -> None:
        self._backend, self._shape = BACKENDS[backend], Shape.of(weight)
        self._packed = self._backend.pack(weight, CPU, torch.bfloat16)
        self.num_bytes = sum(t.nbytes for name, t in self._packed.items() if name != "copy")

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: self._backend.matmul(x, self._packed, self._shape)


class Wide(Product):
    """torch's own linear, as transformers has it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.bfloat16()
        self.num_bytes = self._weight.nbytes

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: F.linear(x, self._weight)


class GgmlProduct(Product):
    def __init__(self, library: Ggml, kind: str, weight: Tensor) -> None:
        self._matrix = library.matrix(kind, weight)
        self.num_bytes = self._matrix.num_bytes

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        return self._matrix.bind(x.float())


class Onnx(Product):
    """A model of one node, `com.microsoft.MatMulNBits`."""

    same_weights = True

    def __init__(self, weight: QuantizedWeight, level: int, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model, self.num_bytes = _matmul_nbits(weight, level)
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        inputs = {"x": x.float().numpy()}
        return lambda: torch.from_numpy(self._session.run(None, inputs)[0])


def _matmul_nbits(weight: QuantizedWeight, level: int) -> tuple[bytes, int]:
    """(the serialised model, bytes of its weights). Zero points are packed in pairs of groups."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    (n, k), group = weight.q.shape, weight.group_size
    blocks = weight.q.view(n, k // group, group)
    tensors: dict[str, Any] = {
        "w": blocks[..., 0::2] | blocks[..., 1::2] << 4,
        "scale": weight.scale.float().flatten(),
        "zero": (weight.zero[:, 0::2] | weight.zero[:, 1::2] << 4).flatten(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=group, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString(), sum(t.nbytes for t in tensors.values())
