"""Async tests run without a plugin, each in an event loop of its own; and one thread computes."""

from __future__ import annotations

import asyncio
import inspect
import sys

import pytest
from hypothesis import settings

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
