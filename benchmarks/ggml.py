"""ggml's matrix product on a CPU, through its shared libraries' C interface.

Weights are placed where llama.cpp places them: in the buffer type that repacks them for this
CPU's instructions, if it takes their type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"F32": 0, "Q4_0": 2, "Q4_K": 12}
"""enum ggml_type."""
LIBRARIES = ("libggml-base.so", "libggml-cpu.so")
CONTEXT_BYTES = 1 << 20
"""For the descriptions of tensors and graphs, not their data."""

_pointer, _int64, _size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The libraries of a folder, and a CPU backend with so many threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        base, cpu = (ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in LIBRARIES)

        def function(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> object:
            found = getattr(library, name)
            found.restype, found.argtypes = result, list(arguments)
            return found

        self.init = function(base, "ggml_init", _pointer, InitParams)
        self.new_2d = function(
            base, "ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, _int64, _int64
        )
        self.mul_mat = function(base, "ggml_mul_mat", _pointer, _pointer, _pointer, _pointer)
        self.new_graph = function(base, "ggml_new_graph", _pointer, _pointer)
        self.expand = function(base, "ggml_build_forward_expand", None, _pointer, _pointer)
        self.allocate = function(
            base, "ggml_backend_alloc_ctx_tensors_from_buft", _pointer, _pointer, _pointer
        )
        self.set = function(base, "ggml_backend_tensor_set", None, _pointer, _pointer, _size, _size)
        self.data = function(base, "ggml_get_data", _pointer, _pointer)
        self.compute = function(
            base, "ggml_backend_graph_compute", ctypes.c_int, _pointer, _pointer
        )
        self.row_size = function(base, "ggml_row_size", _size, ctypes.c_int, _int64)
        self.quantize = function(
            base, "ggml_quantize_chunk", _size,
            ctypes.c_int, _pointer, _pointer, _int64, _int64, _int64, _pointer,
        )  # fmt: skip
        self.plain = function(base, "ggml_backend_cpu_buffer_type", _pointer)()
        self.backend = function(cpu, "ggml_backend_cpu_init", _pointer)()
        function(cpu, "ggml_backend_cpu_set_n_threads", None, _pointer, ctypes.c_int)(
            self.backend, threads
        )
        registry = function(cpu, "ggml_backend_cpu_reg", _pointer)()
        device = function(base, "ggml_backend_reg_dev_get", _pointer, _pointer, _size)(registry, 0)
        address = function(
            base, "ggml_backend_reg_get_proc_address", _pointer, _pointer, ctypes.c_char_p
        )(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(_pointer), _pointer)(address)(device)
        name = function(base, "ggml_backend_buft_name", ctypes.c_char_p, _pointer)
        types = {}
        index = 0
        while extra[index]:
            types[name(extra[index]).decode()] = extra[index]
            index += 1
        self.repacking = types.get("CPU_REPACK", self.plain)

    def context(self) -> int:
        return self.init(InitParams(CONTEXT_BYTES, None, True))

    def matrix(self, kind: str, weight: Tensor) -> GgmlMatrix:
        """weight: (N, K) fp32."""
        return GgmlMatrix(self, kind, weight)


class GgmlMatrix:
    def __init__(self, ggml: Ggml, kind: str, weight: Tensor) -> None:
        n, k = weight.shape
        self._ggml, self._n, self._k = ggml, n, k
        self.num_bytes = n * ggml.row_size(TYPES[kind], k)
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        weight = weight.contiguous()
        ggml.quantize(TYPES[kind], weight.data_ptr(), data.data_ptr(), 0, n, k, None)
        context = ggml.context()
        self._tensor = ggml.new_2d(context, TYPES[kind], k, n)
        ggml.allocate(context, ggml.repacking)
        ggml.set(self._tensor, data.data_ptr(), 0, self.num_bytes)

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        """x: (M, K) fp32 -> what computes (M, N) fp32."""
        ggml, rows = self._ggml, x.shape[0]
        context = ggml.context()
        inputs = ggml.new_2d(context, TYPES["F32"], self._k, rows)
        result = ggml.mul_mat(context, self._tensor, inputs)
        graph = ggml.new_graph(context)
        ggml.expand(graph, result)
        ggml.allocate(context, ggml.plain)
        x = x.contiguous()
        ggml.set(inputs, x.data_ptr(), 0, x.nbytes)
        floats = (ctypes.c_float * (rows * self._n)).from_address(ggml.data(result))
        y = torch.frombuffer(floats, dtype=torch.float32).view(rows, self._n)

        def compute() -> Tensor:
            status = ggml.compute(ggml.backend, graph)
            if status:
                raise RuntimeError(f"ggml's graph ended with status {status}")
            return y

        return compute
