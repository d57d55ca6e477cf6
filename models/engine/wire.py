"""What passes between an engine's process and its parent, and how."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import torch

from models.engine.messages import (
    Abort,
    EngineStats,
    GenerationDelta,
    GenerationRequest,
    ServedModel,
)
from models.errors import EngineDead


@dataclass(frozen=True)
class Ready:
    model: ServedModel
    stats: EngineStats


@dataclass(frozen=True)
class Step:
    """What is due after a step. Not every step has one."""

    deltas: list[GenerationDelta]
    stats: EngineStats


@dataclass(frozen=True)
class Ended:
    reason: EngineDead
    stats: EngineStats


@dataclass(frozen=True)
class Close:
    """To the child: end what runs and waits."""


ToChild: TypeAlias = "GenerationRequest | Abort | Close"


class _Pickler(pickle.Pickler):
    """Tensors as plain bytes; torch's own way would wrap each into a file of its own format."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def send(connection: Connection[Any, Any], message: object) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    connection.send_bytes(buffer.getbuffer())


def receive(connection: Connection[Any, Any]) -> Any:
    """What the other half of the same program has sent, over a socket that nobody else has."""
    return pickle.loads(connection.recv_bytes())
