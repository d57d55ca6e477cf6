"""Kernels of our own for CPUs, in C++, compiled at first use; see `models.native.library`."""

from __future__ import annotations

from models.native.library import Kernels, kernels

__all__ = ["Kernels", "kernels"]
