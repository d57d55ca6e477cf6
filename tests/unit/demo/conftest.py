"""Shared by the demo model's tests."""

from __future__ import annotations

from random import Random

import pytest


@pytest.fixture
def rng():
    return Random("a test")
