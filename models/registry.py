"""Named choices whose unknown names are answered with the known ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from models.errors import CheckpointError, TinyChatError

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order of their registration."""

    def __init__(self, noun: str, error: type[TinyChatError] = CheckpointError) -> None:
        """
        Args:
            noun: what an entry is, for messages: "projector", "AWQ format".
            error: raised for an unknown name.
        """
        self._noun = noun
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        if name in self._entries:
            raise ValueError(f"the {self._noun} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise self._error(f"unknown {self._noun} {name!r}; known: {', '.join(self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def values(self) -> Iterator[T]:
        return iter(self._entries.values())
