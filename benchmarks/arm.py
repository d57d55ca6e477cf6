"""One way to have questions answered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from benchmarks.load import Answer, Question


class Arm(ABC):
    """
    Attributes:
        name: in tables and records.
    """

    name: str

    @abstractmethod
    async def start(self) -> None:
        """Returns once it is ready to answer."""

    @abstractmethod
    async def ask(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        """Asks all at once and returns when all are answered.

        Args:
            num_tokens: of each answer, whatever the model would like to say.
        """

    @abstractmethod
    async def close(self) -> None: ...
