"""A JSON file of settings whose every wrong value is reported with its key and file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from models.errors import CheckpointError

T = TypeVar("T")


class JsonConfig:
    """One JSON object and the name of the file it was read from."""

    def __init__(self, values: dict[str, Any], label: str) -> None:
        self.values = values
        self.label = label

    @classmethod
    def read(cls, path: Path, label: str) -> JsonConfig:
        """
        Raises:
            CheckpointError: no such file, or it does not hold a JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{label} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{label} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{label} must hold a JSON object")
        return cls(values, label)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value; `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else self._checked(key, kind, value)

    def require(self, key: str, kind: type[T]) -> T:
        value = self.values.get(key)
        if value is None:
            raise CheckpointError(f"{self.label} lacks {key!r}")
        return self._checked(key, kind, value)

    def sub(self, key: str) -> JsonConfig:
        return JsonConfig(self.require(key, dict), f"{self.label} ({key})")

    def problem(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: {key} is {self.values.get(key)!r}; {what}")

    def _checked(self, key: str, kind: type[T], value: Any) -> T:
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.problem(key, f"it must be of type {kind.__name__}")
        return value
