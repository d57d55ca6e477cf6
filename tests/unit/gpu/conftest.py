"""bfloat16 in Triton's interpreter as it is on a GPU.

The interpreter rounds to it towards zero, and multiplies its matrices as the integers that the bits
are.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_as_on_a_gpu() -> Iterator[None]:
    if importlib.util.find_spec("triton") is None or not os.environ.get("TRITON_INTERPRET"):
        yield
        return
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(builder: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(builder, source, dtype)
        values = torch.from_numpy(np.ascontiguousarray(source.data))
        return TensorHandle(values.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(builder, wide(a), wide(b), *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InterpreterBuilder, "cast_impl", cast)
        patched.setattr(InterpreterBuilder, "create_dot", dot)
        yield
