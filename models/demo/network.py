"""The model as it is trained: float32 parameters under the checkpoint's own names.

Whole rows at once, with a mask, so that it can be compiled; the served model
(`models/vision`, `models/language`) works on a paged cache, and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.demo.labels import FIRST_WITH_WORD, SIZES
from models.demo.packing import NO_TARGET
from models.demo.roles import ROLES
from models.demo.tokenizer import VOCABULARY

ROLE_WEIGHTS = (0.3, 1.0, 1.0)
"""In their loss: most words and patches are not mentioned."""
UNSEEN = -1e4
"""The score of a token that is not to be seen."""


@dataclass(frozen=True)
class NetworkConfig:
    """Widths of the language model are multiples of 128, as 4-bit groups want them.

    Attributes:
        tower_layers: that are used; the checkpoint has one more, which `mm_vision_select_layer`
            -2 leaves out.
    """

    image_size: int = 96
    patch_size: int = 16
    tower_hidden: int = 192
    tower_intermediate: int = 576
    tower_layers: int = 3
    tower_heads: int = 3
    vocabulary: int = VOCABULARY
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Batch(NamedTuple):
    """R rows of L tokens about one picture each; A answers' tokens in all, filled up with none.

    Attributes:
        pixels: (R, 3, S, S).
        labels: (R, patches, labels).
        ids, picture, position, tree, branch, role: (R, L), see `packing.Row`.
        target_at: (A,) index into the R * L tokens.
        target: (A,) ids; NO_TARGET fills up.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    picture: Tensor
    position: Tensor
    tree: Tensor
    branch: Tensor
    role: Tensor
    target_at: Tensor
    target: Tensor


class Losses(NamedTuple):
    """Scalars, but for `roles`.

    Attributes:
        answers: of the answers' tokens.
        patches: of the patches' labels, told from the tower's features by a head of their own.
        words: of the same labels, told from the projected features by the embeddings of their
            words. It makes a red circle look like "red" and "circle" to the language model, which
            then finds what it is asked about far sooner.
        roles: three of them, of roles in questions that come before the picture: the words' after
            the first layer, the patches' after the second and the third.
    """

    answers: Tensor
    patches: Tensor
    words: Tensor
    roles: Tensor


class TowerAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TowerMLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        out: Tensor = self.fc2(wide * torch.sigmoid(1.702 * wide))
        return out


class TowerLayer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.tower_hidden)
        self.self_attn = TowerAttention(config.tower_hidden, config.tower_heads)
        self.layer_norm2 = nn.LayerNorm(config.tower_hidden)
        self.mlp = TowerMLP(config.tower_hidden, config.tower_intermediate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Tower(nn.Module):
    """CLIPVisionModel up to the hidden state -2, class token left out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        hidden, patch = config.tower_hidden, config.patch_size
        self.class_embedding = nn.Parameter(0.02 * torch.randn(hidden))
        self.patch_embedding = nn.Linear(3 * patch * patch, hidden, bias=False)
        self.position_embedding = nn.Parameter(0.1 * torch.randn(config.num_patches + 1, hidden))
        self.pre_layrnorm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.tower_layers))
        self.patch_size = patch

    def forward(self, pixels: Tensor) -> Tensor:
        """(R, 3, S, S) -> (R, patches, hidden)."""
        size = self.patch_size
        cut = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_embedding(cut.flatten(3).flatten(1, 2))
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.pre_layrnorm(torch.cat((first, patches), dim=1) + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden, config.hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Written out, since torch's own kernel goes backward at a third of this speed on a CPU.
        scores = _rotate(q, *rotation) @ _rotate(k, *rotation).mT * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~mask, UNSEEN).softmax(-1) @ v
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden, config.intermediate, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Network(nn.Module):
    """Tower, projector and Llama, with the auxiliary heads on the tower and on the first layers."""

    def __init__(self, config: NetworkConfig, words: Sequence[Sequence[int]] = ()) -> None:
        """
        Args:
            words: token ids of `labels.WORDS`; for training only.
        """
        super().__init__()
        self.config = config
        self.words = [torch.tensor(ids) for ids in words]
        self.tower = Tower(config)
        self.patch_head = nn.Linear(config.tower_hidden, sum(SIZES))
        self.projector = nn.Sequential(
            nn.Linear(config.tower_hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
        )
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.role_heads = nn.ModuleList(nn.Linear(config.hidden, ROLES) for _ in range(3))
        self._initialise()

    def _initialise(self) -> None:
        depth = (2 * len(self.layers)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
                spread = module.in_features**-0.5 * (depth if residual else 1.0)
                nn.init.normal_(module.weight, std=spread)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def predict(self, batch: Batch) -> Tensor:
        """(A,) the likeliest id for each target."""
        return self.logits(batch).argmax(-1)

    def forward(self, batch: Batch, tower_only: bool = False) -> Losses:
        """
        Args:
            tower_only: leave out the language model's layers; the answers' loss is then zero.
        """
        features = self.tower(batch.pixels)
        patches_loss = self._patches_loss(features, batch.labels)
        pictures = self.projector(features)
        words_loss = self._words_loss(pictures, batch.labels)
        if tower_only:
            none = torch.zeros(())
            return Losses(none, patches_loss, words_loss, none)
        states = self._states(pictures, batch)
        answers_loss = F.cross_entropy(
            self._answers(states[-1], batch).float(), batch.target, ignore_index=NO_TARGET
        )
        return Losses(answers_loss, patches_loss, words_loss, self._roles_loss(states, batch))

    def logits(self, batch: Batch) -> Tensor:
        """(A, vocabulary), one row for each target."""
        pictures = self.projector(self.tower(batch.pixels))
        return self._answers(self._states(pictures, batch)[-1], batch)

    def _answers(self, state: Tensor, batch: Batch) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(state).flatten(0, 1)[batch.target_at])
        return logits

    def _roles_loss(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        is_picture = batch.picture >= 0
        weights = torch.tensor(ROLE_WEIGHTS)
        words = batch.role.masked_fill(is_picture, NO_TARGET).flatten()
        patches = batch.role.masked_fill(~is_picture, NO_TARGET).flatten()
        losses = []
        for head, state, wanted in zip(
            self.role_heads, states, (words, patches, patches), strict=False
        ):
            scores = head(F.rms_norm(state, state.shape[-1:])).float().flatten(0, 1)
            losses.append(F.cross_entropy(scores, wanted, weights, ignore_index=NO_TARGET))
        return torch.stack(losses)

    def _patches_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        scores = self.patch_head(features).float().flatten(0, 1).split(SIZES, dim=-1)
        flat = labels.flatten(0, 1)
        losses = [F.cross_entropy(score, flat[:, i]) for i, score in enumerate(scores)]
        return torch.stack(losses).sum()

    def _words_loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        flat_pictures, flat_labels = pictures.flatten(0, 1), labels.flatten(0, 1)
        losses = []
        for index, (ids, first) in enumerate(zip(self.words, FIRST_WITH_WORD, strict=True)):
            embedded = self.embed_tokens(ids)
            scores = (flat_pictures @ embedded.T).float() * embedded.shape[-1] ** -0.5
            wanted = flat_labels[:, index] - first
            wanted = torch.where(wanted >= 0, wanted, NO_TARGET)
            losses.append(F.cross_entropy(scores, wanted, ignore_index=NO_TARGET))
        return torch.stack(losses).sum()

    def _states(self, pictures: Tensor, batch: Batch) -> list[Tensor]:
        """(R, L, hidden) after each layer."""
        is_picture = batch.picture >= 0
        index = batch.picture.clamp(min=0).unsqueeze(-1).expand(-1, -1, pictures.shape[-1])
        x = torch.where(
            is_picture.unsqueeze(-1), pictures.gather(1, index), self.embed_tokens(batch.ids)
        )
        rotation = self._rotation(batch.position, x.dtype)
        mask = _mask(batch.tree, batch.branch)
        states = []
        for layer in self.layers:
            x = layer(x, rotation, mask)
            states.append(x)
        return states

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, 1, L, head) cosines and sines, Llama's halves."""
        size = self.config.hidden // self.config.heads
        exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
        angle = position.unsqueeze(-1).float() * self.config.rope_theta**-exponent
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


def _mask(tree: Tensor, branch: Tensor) -> Tensor:
    """(R, 1, L, L): which token (row) sees which (column)."""
    length = tree.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same_tree = tree.unsqueeze(2) == tree.unsqueeze(1)
    seen = branch.unsqueeze(1)
    on_path = (seen == 0) | (seen == branch.unsqueeze(2))
    return (earlier & same_tree & on_path).unsqueeze(1)
