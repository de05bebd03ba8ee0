"""How many requests may be under way to one host, learnt from its answers.

`Throttle` hands out slots to the threads of a client: the limit doubles each round trip until the host first asks to
slow down, then grows by one a round trip and is halved at each such answer (additive increase, multiplicative
decrease, as in TCP). Requests that started before the last cut do not cut again: one burst of 503 answers is one
signal, not thirty. A Retry-After pauses the whole host, because it speaks for the host and not for one key.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager


class Throttle:
    """Slots for requests to one host, between one and `most`; safe to share between threads and clients."""

    def __init__(self, *, start: int, most: int) -> None:
        self.limit = float(min(start, most))
        self.most = most
        self.peak = 0
        self._in_flight = 0
        self._found_limit = False
        self._last_cut = 0.0
        self._paused_until = 0.0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def slot(self) -> Iterator[float]:
        """Wait for a slot and hold it; yields the time it was taken. Raises CancelledError once closed."""
        with self._changed:
            while not self._closed:
                pause = self._paused_until - time.monotonic()
                if pause <= 0 and self._in_flight < int(self.limit):
                    break
                # At most a second: a wake-up that went to a thread which then met a pause is made good.
                self._changed.wait(min(pause, 1.0) if pause > 0 else 1.0)
            if self._closed:
                raise CancelledError("the client was closed")
            self._in_flight += 1
            self.peak = max(self.peak, self._in_flight)
        try:
            yield time.monotonic()
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def speed_up(self) -> None:
        """Note an answer that was served."""
        with self._changed:
            before = int(self.limit)
            step = 1 / self.limit if self._found_limit else 1.0
            self.limit = min(self.limit + step, float(self.most))
            if int(self.limit) > before:
                self._changed.notify()

    def slow_down(self, started: float, pause_s: float = 0.0) -> None:
        """Note that the host asked a request begun at `started` to slow down, and for how long to be quiet."""
        with self._changed:
            self._found_limit = True
            if started >= self._last_cut:
                self.limit = max(1.0, self.limit / 2)
                self._last_cut = time.monotonic()
            self._paused_until = max(self._paused_until, time.monotonic() + pause_s)

    def wait(self, seconds: float) -> None:
        """Sleep without holding a slot. Raises CancelledError as soon as the throttle is closed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=max(0.0, deadline - time.monotonic()))
            if self._closed:
                raise CancelledError("the client was closed")

    def close(self) -> None:
        """Wake every thread that waits; they raise CancelledError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def backoff_s(attempt: int, first_s: float, most_s: float, dice: random.Random) -> float:
    """Seconds to wait after the `attempt`-th failure (from 1): full jitter, uniform below a doubling ceiling."""
    ceiling = min(most_s, first_s * 2 ** min(attempt - 1, 60))
    return dice.uniform(0, ceiling)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, given as a number or as an HTTP date; None where it is absent or unreadable."""
    if not value:
        return None
    value = value.strip()
    if value.isdecimal() and len(value) <= 9:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None
