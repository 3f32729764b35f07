"""How fast the teacher may be asked: calls in flight, requests and tokens a minute, and pauses it asks for."""

from __future__ import annotations

import asyncio
import collections
from types import TracebackType

_FIRST_CALLS = 4  # in flight at the start; each success opens one more: no thundering herd


class Gate:
    """At most `max_calls` in flight, first come first served, opened slowly. One event loop, all its coroutines.

    A provider's "not before" closes the gate for everybody, and it opens slowly again.
    """

    def __init__(self, max_calls: int):
        self._max_calls = max_calls
        self._open = min(_FIRST_CALLS, max_calls)
        self._active = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._not_before = 0.0

    async def __aenter__(self) -> None:
        if self._active >= self._open or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn  # whoever wakes us has counted us as active
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        else:
            self._active += 1
        try:
            while (wait_s := self._not_before - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self._leave()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def succeeded(self) -> None:
        """One more call may be in flight."""
        if self._open < self._max_calls:
            self._open += 1
            self._wake()

    def pause(self, seconds: float) -> None:
        """Nobody passes before `seconds` are over."""
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + seconds)
        self._open = min(_FIRST_CALLS, self._max_calls)

    def _leave(self) -> None:
        self._active -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._active < self._open:
            turn = self._waiting.popleft()
            if not turn.done():
                self._active += 1
                turn.set_result(None)


class RateLimit:
    """A bucket that refills at `per_minute`; it holds `burst_s` seconds' worth, so nothing starts with a flood."""

    def __init__(self, per_minute: int, burst_s: float = 5.0):
        self._per_s = per_minute / 60.0
        self._burst = max(1.0, self._per_s * burst_s)
        self._level = self._burst
        self._last: float | None = None
        self._lock = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Waits until `amount` may be spent. More than the bucket holds waits for a full one and owes the rest."""
        if not self._per_s:
            return
        async with self._lock:  # first come, first served
            self._refill()
            need = min(amount, self._burst)
            while self._level < need:
                await asyncio.sleep((need - self._level) / self._per_s)
                self._refill()
            self._level -= amount

    def give_back(self, amount: float) -> None:
        """Corrects an estimate that was too high (or, with a negative amount, too low)."""
        self._level = min(self._burst, self._level + amount)

    def _refill(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._last is not None:
            self._level = min(self._burst, self._level + (now - self._last) * self._per_s)
        self._last = now
