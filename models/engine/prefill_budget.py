"""How much of a prompt a step computes beside running streams, by what steps are seen to cost.

A step is as slow as all that is in it, so prompts delay every running stream. Their delay is kept
as an account, in seconds: each step in which the streams advance allows them to be delayed by a
share of what that step takes without prompts, and what a step takes more than that is charged. A
prompt goes on when the account is not overdrawn. So the streams' time per token grows by at most
that share on average, whatever the processor and the model; and prompts always go on, since each
step without them pays something in.

With asynchronous scheduling a step is charged when the next one has been scheduled already, so that
two may spend the same account; the average is kept.

The pieces have a least size: many products read all weights for a few rows as for many, and a
prompt cut too fine would cost several times as much. It is what a stream may be held up at once.
"""

from __future__ import annotations

MIN_CHUNK = 64
"""Tokens. On a CPU 64 rows take, for each, some 10 % longer than 512 do; 16 rows twice as long."""
FREE_S = 0.03
"""Each request may delay the others by so much at once: short prompts are computed in one piece,
and many that come together fill the batch without waiting for one another."""
SMOOTHING = 0.2
"""Weight of the newest measurement in the averages."""


class PrefillBudget:
    """
    Attributes:
        max_slowdown: the share by which streams' time per token may grow; None: without limit.
    """

    def __init__(self, max_slowdown: float | None) -> None:
        self.max_slowdown = max_slowdown
        self._account_s = FREE_S
        self._decode_s: float | None = None
        self._prompt_token_s: float | None = None

    def arrive(self) -> None:
        """A request has come."""
        self._account_s += FREE_S

    def tokens(self) -> int | None:
        """Of prompts, in a step with running streams; None: as many as it holds."""
        if self.max_slowdown is None or self._decode_s is None or self._prompt_token_s is None:
            return None
        if self._account_s <= 0:
            return 0
        return max(MIN_CHUNK, int(self._account_s / self._prompt_token_s))

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took, in which so many streams advanced."""
        if num_decodes and not num_prompt_tokens:
            self._decode_s = _average(self._decode_s, seconds)
        delay = seconds - (self._decode_s or 0) if num_decodes else seconds
        if num_prompt_tokens:
            self._prompt_token_s = _average(
                self._prompt_token_s, max(delay, 1e-9) / num_prompt_tokens
            )
        if num_decodes and self.max_slowdown is not None and self._decode_s is not None:
            allowed = self.max_slowdown * self._decode_s
            if num_prompt_tokens:
                self._account_s += allowed - delay
            else:
                # No longer than this is remembered that there was nothing to delay.
                self._account_s = min(self._account_s + allowed, FREE_S)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
