"""Kernels of our own for GPUs, in Triton. Their modules need triton, so they are imported where
they are used; `models.gpu.support` says whether they can be."""
