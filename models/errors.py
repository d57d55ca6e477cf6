"""What can go wrong, as types. Every message is written for the person who caused it.

A message names the field or file, the value's problem, and what would be right. It carries no
stack trace, no memory address and no path that the caller did not give.
"""

from __future__ import annotations


class TinyChatError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidRequest(TinyChatError, ValueError):
    """A request that cannot be served, by its sender's fault.

    Attributes:
        field: the request's field that is wrong, by its name on the wire.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class CheckpointError(TinyChatError):
    """Files on disk that cannot be served: missing, left over, misshaped, of an unknown kind."""


class ConfigurationError(TinyChatError):
    """Options that cannot be fulfilled on this machine, or that exclude each other."""


class EngineOverloaded(TinyChatError):
    """More requests than the engine may hold; the request was not queued."""


class EngineDead(TinyChatError):
    """The engine has stopped, closed or crashed, and takes no more requests."""


class RequestTimeout(TinyChatError):
    """The request waited for its turn longer than its deadline allowed."""


class RequestAborted(TinyChatError):
    """The request was taken back before it had finished."""


class EngineFault(TinyChatError):
    """The engine failed on this request (out of memory, say); other requests go on."""
