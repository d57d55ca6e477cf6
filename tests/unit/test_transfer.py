"""What goes to a device arrives as it was."""

from __future__ import annotations

import torch

from models.transfer import Download, upload

CPU = torch.device("cpu")


def test_numbers_keep_their_precision() -> None:
    for value in (0.8833108082136426, 1 - 2**-40, 20000001.0):
        assert upload([value], CPU, torch.float64).tolist() == [value]
    assert upload([20000001], CPU).tolist() == [20000001]


def test_a_download_is_what_was_there() -> None:
    tokens = torch.arange(5)
    assert Download(tokens).fetch().tolist() == tokens.tolist()
