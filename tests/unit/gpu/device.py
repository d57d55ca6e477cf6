"""Where the kernels' tests run: on the GPU, or in Triton's interpreter where there is none.

`tests/conftest.py` turns the interpreter on.
"""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Older interpreters fail with NumPy 2.4.
pytest.importorskip("triton", minversion="3.6" if DEVICE.type == "cuda" else "3.7")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
