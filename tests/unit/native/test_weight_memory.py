"""Pieces of memory: aligned, apart from each other, and there as long as someone has them."""

from __future__ import annotations

import gc
from pathlib import Path

from models.native.weight_memory import ALIGNMENT, HUGE_PAGE, REGION_BYTES, WeightMemory


def test_pieces_are_aligned_and_apart() -> None:
    memory = WeightMemory()
    pieces = [memory.empty(size) for size in (1, 63, 64, 65, 1000, REGION_BYTES // 3) * 3]
    for value, piece in enumerate(pieces):
        assert piece.data_ptr() % ALIGNMENT == 0
        piece.fill_(value)
    assert all(bool((piece == value).all()) for value, piece in enumerate(pieces))


def test_a_piece_may_be_larger_than_a_region() -> None:
    piece = WeightMemory().empty(REGION_BYTES + 5)
    assert len(piece) == REGION_BYTES + 5 and piece.data_ptr() % HUGE_PAGE == 0


def test_a_piece_outlives_its_memory() -> None:
    memory = WeightMemory()
    piece = memory.empty(100)
    piece.fill_(7)
    memory.empty(REGION_BYTES)  # another region, from which pieces are cut from now on
    del memory
    gc.collect()
    assert piece.tolist() == [7] * 100


def test_what_is_not_written_to_takes_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    piece = WeightMemory().empty(REGION_BYTES)
    assert resident() - before < REGION_BYTES // 4
    piece.fill_(1)
    assert resident() - before > REGION_BYTES // 2
