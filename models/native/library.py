"""The compiled kernels, called through their plain C interface.

ctypes lets go of Python's lock during a call, and costs some two microseconds; a custom operator
of torch costs ten times that, which 100 layers of a small model would feel.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from models.native.build import BuildError, build
from models.native.weight_memory import WeightMemory

logger = logging.getLogger(__name__)

SWITCH = "TINYCHAT_NATIVE"
"""Environment variable; 0 turns the kernels off."""
INSTRUCTIONS = frozenset(
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "bmi2", "f16c"}
)

HEAD_DIMS = (64, 96, 128)
BLOCK_MULTIPLE = 16
"""What kernels that read the KV cache can do."""

_pointer, _int64, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Kernels:
    """See the C++ sources for what each computes. Tensors are contiguous and on the CPU."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: it cannot be loaded, e.g. for a symbol that this process does not have.
        """
        self._memory = WeightMemory()
        library = ctypes.CDLL(str(path))
        self._packed_bytes = library.w4a16_packed_bytes
        self._packed_bytes.argtypes = [_int64] * 3
        self._packed_bytes.restype = _int64
        self._pack = library.w4a16_pack
        self._pack.argtypes = [
            _pointer, _pointer, _pointer, _float, _int64, _int64, _int64, _pointer, _int,
        ]  # fmt: skip
        self._pack.restype = None
        self._matmul = library.w4a16_matmul
        self._matmul.argtypes = [_pointer, _pointer, _int64, _pointer, _int]
        self._matmul.restype = _int
        self._dense = library.dense_matmul
        self._dense.argtypes = [_pointer, _pointer, _int64, _int64, _int64, _pointer, _int]
        self._dense.restype = _int
        self._attention = library.paged_attention
        self._attention.argtypes = [
            _pointer, _int64, _pointer, _pointer, _pointer, _pointer,
            *[_int64] * 6, _float, _pointer, _int64, _int,
        ]  # fmt: skip
        self._attention.restype = _int
        self._prompt_attention = library.prompt_attention
        self._prompt_attention.argtypes = [
            _pointer, _int64, _pointer, _pointer, _pointer, *[_int64] * 7, _float,
            _pointer, _int64, _int,
        ]  # fmt: skip
        self._prompt_attention.restype = None

        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = [
            _pointer, _pointer, _pointer, _float, _int64, _int64, _pointer, _int,
        ]  # fmt: skip
        self._rms_norm.restype = None
        self._swiglu = library.swiglu
        self._swiglu.argtypes = [_pointer, _int64, _int64, _pointer, _int]
        self._swiglu.restype = None
        self._rotate_and_store = library.rotate_and_store
        self._rotate_and_store.argtypes = [
            *[_pointer] * 4, *[_int64] * 4, _pointer, _pointer, _int,
        ]  # fmt: skip
        self._rotate_and_store.restype = None

    def w4a16_pack(self, q: Tensor, scale: Tensor, zero: Tensor, multiplier: float) -> Tensor:
        """
        Args:
            q: (N, K) uint8.
            scale: (N, K / G) fp16, times 1 / `multiplier`. G is a multiple of 32.
            zero: (N, K / G) uint8.

        Returns:
            uint8, for `w4a16_matmul`.
        """
        n, k = q.shape
        group = k // scale.shape[1]
        packed = self._memory.empty(self._packed_bytes(n, k, group))
        self._pack(
            q.data_ptr(), scale.data_ptr(), zero.data_ptr(), multiplier, n, k, group,
            packed.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return packed

    def w4a16_matmul(self, x: Tensor, packed: Tensor, n: int) -> Tensor:
        """x: (M, K) bf16 -> (M, N) bf16. `packed` is of an N x K weight."""
        rows = x.shape[0]
        y = x.new_empty(rows, n)
        if self._matmul(
            x.data_ptr(), packed.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()
        ):
            raise MemoryError(f"no memory to multiply {rows} rows")
        return y

    def dense_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: (M, K) bf16, weight: (N, K) bf16 -> (M, N) float32."""
        (rows, k), n = x.shape, weight.shape[0]
        y = torch.empty(rows, n)
        if self._dense(
            x.data_ptr(), weight.data_ptr(), rows, n, k, y.data_ptr(), torch.get_num_threads()
        ):
            raise MemoryError(f"no memory to multiply {rows} rows")
        return y

    def paged_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, last: Tensor, out: Tensor
    ) -> None:
        """One query of each sequence.

        Args:
            q, out: (sequences, heads, head_dim) bf16; `out` is written. Only their sequences may
                lie apart.
            keys, values: (blocks, kv_heads, block_size, head_dim) bf16; see `HEAD_DIMS` and
                `BLOCK_MULTIPLE`.
            tables: (sequences, kv_heads, width) int64; see `KVCacheShape.tables`.
            last: (sequences,) int64, each query's position.
        """
        sequences, heads, head_dim = q.shape
        _, kv_heads, width = tables.shape
        if self._attention(
            q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            last.data_ptr(), sequences, kv_heads, heads // kv_heads, head_dim, keys.shape[2],
            width, head_dim**-0.5, out.data_ptr(), out.stride(0), torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError(f"no memory for the scores of {width * keys.shape[2]} tokens")

    def prompt_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, context: int, out: Tensor
    ) -> None:
        """Consecutive queries of one sequence, whose own keys and values are in the cache already.

        Args:
            q, out: (rows, heads, head_dim) bf16; `out` is written. Only their rows may lie apart.
            keys, values: as `paged_attention`'s.
            tables: (kv_heads, width) int64, the sequence's up to the last query's block at least.
            context: the first query's position.
        """
        rows, heads, head_dim = q.shape
        kv_heads, width = tables.shape
        self._prompt_attention(
            q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            context, rows, kv_heads, heads // kv_heads, head_dim, keys.shape[2], width,
            head_dim**-0.5, out.data_ptr(), out.stride(0), torch.get_num_threads(),
        )  # fmt: skip

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None
    ) -> Tensor:
        """The norm of x, or of x + `delta`, which is left in x.

        Args:
            x, delta: (tokens, size) bf16.
            weight: (size,) bf16.
        """
        rows, size = x.shape
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), eps,
            rows, size, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * size) bf16, the gates first -> (tokens, size)."""
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._swiglu(gate_up.data_ptr(), rows, width // 2, out.data_ptr(), torch.get_num_threads())
        return out

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Rotates the queries where they are, and puts rotated keys, and values, into the cache.

        Args:
            qkv: (tokens, heads + 2 * kv_heads, head_dim) bf16; head_dim is a multiple of 32.
            cos, sin: (tokens, 1, head_dim) bf16.
            slots: (tokens, kv_heads) int64; see `KVCacheShape.slots`.
            keys, values: (blocks, kv_heads, block_size, head_dim) bf16; written.

        Returns:
            (tokens, heads, head_dim), the queries in `qkv`.
        """
        tokens, all_heads, head_dim = qkv.shape
        kv_heads = slots.shape[1]
        heads = all_heads - 2 * kv_heads
        self._rotate_and_store(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), tokens, heads,
            kv_heads, head_dim, keys.data_ptr(), values.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return qkv[:, :heads]


@functools.cache
def kernels() -> Kernels | None:
    """The library, compiled if need be, or None, with the reason logged once."""
    if os.environ.get(SWITCH) == "0":
        return None
    missing = INSTRUCTIONS - _cpu_flags()
    if missing:
        logger.info("no native kernels: this CPU has no %s", ", ".join(sorted(missing)))
        return None
    try:
        return Kernels(build())
    except (BuildError, OSError) as error:
        logger.warning("no native kernels, torch's slower ones are used: %s", error)
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
