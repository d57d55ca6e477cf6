"""Training: the rows say what the prompts say, and the loss falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.demo.batches import batches_ahead, make_batches
from models.demo.labels import GRID, NOTHING, PADDING, SIZES, WORDS, patch_labels
from models.demo.network import Batch, Network, NetworkConfig
from models.demo.optimizer import Optimizer, orthogonalised
from models.demo.packing import NO_TARGET, PICTURE, PICTURE_TOKENS, Branch, Tree, lay_out
from models.demo.scenes import SHAPES, Scene, SceneObject
from models.demo.tokenizer import END, train_tokenizer, word_ids


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def _branch(read: list[int], learned: list[int]) -> Branch:
    branch = Branch()
    branch.read(read)
    branch.learn(learned)
    return branch


def _batch(row, pixels) -> Batch:
    at = np.flatnonzero(row.target != NO_TARGET)
    arrays = {
        name: torch.from_numpy(getattr(row, name)[None])
        for name in ("ids", "picture", "position", "tree", "branch", "role")
    }
    return Batch(
        pixels=pixels, labels=torch.zeros(1, PICTURE_TOKENS, len(SIZES), dtype=torch.int64),
        target_at=torch.from_numpy(at), target=torch.from_numpy(row.target[at]), **arrays,
    )  # fmt: skip


def test_a_branch_is_computed_as_if_it_stood_alone():
    torch.manual_seed(0)
    network = Network(NetworkConfig(layers=2)).eval()
    pixels = torch.randn(1, 3, 96, 96)
    root = _branch([1, 300, PICTURE, 301], [])
    questions = [_branch([310, 311], [320, 2]), _branch([312], [321, 322, 2])]
    packed = lay_out([Tree(root, questions), Tree(_branch([1, 333], [334, 2]))])
    together = network.logits(_batch(packed, pixels))
    alone = [
        network.logits(_batch(lay_out([Tree(_branch(root.ids + q.ids[:n], q.ids[n:]))]), pixels))
        for q, n in zip(questions, (2, 1), strict=True)
    ]
    alone.append(network.logits(_batch(lay_out([Tree(_branch([1, 333], [334, 2]))]), pixels)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_targets_are_the_answers(tokenizer):
    batch = next(make_batches(tokenizer, 16, "targets"))
    known = batch.target != NO_TARGET
    ids = batch.ids.flatten()
    at, target = batch.target_at[known], batch.target[known]
    inside = target != END
    assert (ids[at + 1] == target).all()
    assert inside.sum() > 2.5 * (~inside).sum()
    text = tokenizer.decode(target.tolist(), skip_special_tokens=False)
    assert "It is" in text and "The image shows" in text
    assert "ASSISTANT" not in text


def test_batches_are_the_same_for_the_same_seed_in_another_process(tokenizer):
    with batches_ahead(tokenizer, 8, "same") as ahead:
        for here in make_batches(tokenizer, 8, "same"):
            there = next(ahead)
            assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
            break


def test_patch_labels_name_objects_and_padding():
    scene = Scene((SceneObject("star", "blue", 0.25, 0.5, 0.6),), size=(200, 100))
    what, colour, column, row = np.moveaxis(patch_labels(scene).reshape(GRID, GRID, 4), -1, 0)
    assert (what[0] == PADDING).all() and (what[-1] == PADDING).all()
    assert what[2, 1] == 2 + SHAPES.index("star") and colour[2, 1] > 0
    assert (column[2, 1], row[2, 1]) == (1, 2)
    assert what[2, 5] == NOTHING


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in ((4, 32, 64), (2, 64, 32)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert singular.min() > 0.3 and singular.max() < 1.4


def test_the_loss_falls(tokenizer):
    torch.manual_seed(0)
    words = [word_ids(tokenizer, words) for words in WORDS]
    network = Network(NetworkConfig(layers=2), words)
    optimizer = Optimizer(network, muon_rate=4e-3, adam_rate=3e-3)
    batch = next(make_batches(tokenizer, 8, "smoke", last_share=0.5))
    batch = batch._replace(pixels=batch.pixels.float())
    losses = []
    for _ in range(12):
        loss = network(batch)
        losses.append([value.sum().item() for value in loss])
        network.zero_grad()
        (loss.answers + 0.2 * (loss.patches + loss.words + loss.roles.sum())).backward()
        optimizer.step(1.0)
    first, last = losses[0], losses[-1]
    assert last[0] < 0.6 * first[0]
    assert last[1] < first[1]
    assert last[2] < first[2]
    assert last[3] < 0.8 * first[3]
