"""Async tests run without a plugin, each in an event loop of its own; one thread computes; and
without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import sys

import pytest
from hypothesis import settings

# Triton looks at this when it is imported, which any test may be the first to do.
if importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says more about the machine's other work than about ours.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


@pytest.fixture(autouse=True)
def _one_compute_thread() -> None:
    """Tiny products gain nothing from more, and lose a lot where other processes want the cores."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: is skipped where there is no GPU (set by conftest.py)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever says that it needs a GPU is found by `-m gpu`."""
    for item in items:
        reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
        if any("GPU" in reason and reason.startswith("needs") for reason in reasons):
            item.add_marker("gpu")
