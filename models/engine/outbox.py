"""Deltas on their way out of the engine, merged for those who want only so many a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.engine.messages import GenerationDelta


@dataclass
class _Paced:
    """A request whose deltas are merged.

    Attributes:
        tick: of the clock of its interval, the last one at which something went out.
        kept: what has not gone out yet.
    """

    interval_s: float
    tick: int | None = None
    kept: list[GenerationDelta] = field(default_factory=list)


class Outbox:
    """Sits where the deltas arise: what is not sent costs no message, no lock and no wake-up.

    A request's first delta goes out at once, and so does its last; the others when a step ends
    after the clock's next tick. Requests with the same interval share one clock, so that whoever
    reads many of them is woken once for all, and not by each at a moment of its own.

        ticks     |              |              |              |
        steps      a   b   c   d   e   f   g   h   i   j   k   l
        sent       a               bcde            fghi
    """

    def __init__(self) -> None:
        self._paced: dict[str, _Paced] = {}

    def open(self, request_id: str, min_interval_s: float) -> None:
        """A request whose deltas are to be merged, unless the interval is 0."""
        if min_interval_s > 0:
            self._paced[request_id] = _Paced(min_interval_s)

    def post(self, deltas: list[GenerationDelta], now: float) -> list[GenerationDelta]:
        """What is due, these deltas and earlier ones, in the order of each request.

        Args:
            now: by a clock that all calls share.
        """
        if not self._paced:
            return deltas
        due = []
        for delta in deltas:
            paced = self._paced.get(delta.request_id)
            if paced is None:
                due.append(delta)
            elif delta.finish_reason is None:
                paced.kept.append(delta)
            else:
                del self._paced[delta.request_id]
                due += merged_up_to_error([*paced.kept, delta])
        for paced in self._paced.values():
            if paced.kept and (tick := int(now // paced.interval_s)) != paced.tick:
                due.append(merged(paced.kept))
                paced.kept, paced.tick = [], tick
        return due

    def flush(self) -> list[GenerationDelta]:
        """All that is left, when no more steps come."""
        left = [merged(paced.kept) for paced in self._paced.values() if paced.kept]
        self._paced.clear()
        return left


def merged(deltas: Sequence[GenerationDelta]) -> GenerationDelta:
    """Successive deltas of one request as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return GenerationDelta(
        last.request_id,
        "".join([delta.text for delta in deltas]),
        tuple([token for delta in deltas for token in delta.token_ids]),
        last.finish_reason,
        last.usage,
        last.error,
        tuple([logprobs for delta in deltas for logprobs in delta.logprobs]),
        last.stop_reason,
        next((delta.timing for delta in reversed(deltas) if delta.timing is not None), None),
        next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), ()),
    )


def merged_up_to_error(deltas: Sequence[GenerationDelta]) -> list[GenerationDelta]:
    """As one, unless the last is an error: that comes by itself, after all that was before it."""
    if len(deltas) == 1 or deltas[-1].error is None:
        return [merged(deltas)]
    return [merged(deltas[:-1]), deltas[-1]]
