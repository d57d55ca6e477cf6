"""Kernels for GPUs, written in Triton. Nothing here imports triton before a kernel is wanted."""
