"""Layouts of checkpoints on disk, told apart by their folders and keys."""

from __future__ import annotations

from models.checkpoints.layouts.base import Layout, Request
from models.checkpoints.layouts.hf import HfLayout
from models.checkpoints.layouts.llava import LlavaLayout
from models.checkpoints.layouts.vila import VilaLayout
from models.registry import Registry

LAYOUTS: Registry[Layout] = Registry("checkpoint layout")
LAYOUTS.register("vila", VilaLayout())
LAYOUTS.register("llava", LlavaLayout())
LAYOUTS.register("hf", HfLayout())

__all__ = ["LAYOUTS", "Layout", "Request"]
