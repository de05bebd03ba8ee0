"""How many requests a second this machine sends to a host, whoever of its processes sends them.

One file a host holds one number: the moment at which the next request is free to go (a token bucket written as its
theoretical arrival time). A process takes the next moment under a lock and then waits for it outside of the lock; a
server's Retry-After moves the number for everybody. The file is state of the running machine, worth nothing after a
crash, so it is written in place and not synced; its name holds the boot's id because the number is one of the
monotonic clock.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

_STATE = struct.Struct("<d")
_MAX_PAUSE_S = 3600.0
_Change = Callable[[float, float], tuple[float, float | None]]


class Budget:
    """Moments for requests: `per_s` a second and host, after up to `burst` at once."""

    def __init__(self, folder: Path | None, per_s: float, burst: int = 20) -> None:
        self._folder, self._interval_s, self._burst = folder, 1 / per_s, burst
        self._own: dict[str, float] = {}
        self._lock = threading.Lock()

    def reserve(self, host: str, most_s: float, per_s: float | None = None) -> float | None:
        """Seconds to wait before the next request to `host`; None, and nothing is taken, for more than `most_s`.

        `per_s` is this host's own rate where it differs.
        """
        interval = 1 / per_s if per_s else self._interval_s

        def take(free: float, now: float) -> tuple[float, float | None]:
            moment = max(free, now - (self._burst - 1) * interval)
            wait = max(moment - now, 0.0)
            return (free, None) if wait > most_s else (moment + interval, wait)

        return self._change(host, take)

    def pause(self, host: str, seconds: float) -> None:
        """Nobody asks `host` for so long."""
        until = min(seconds, _MAX_PAUSE_S)
        self._change(host, lambda free, now: (max(free, now + until), None))

    def _change(self, host: str, change: _Change) -> float | None:
        with self._lock:
            now = time.monotonic()
            descriptor = self._open(host)
            if descriptor is None:
                self._own[host], wait = change(self._own.get(host, 0.0), now)
                return wait
            try:
                stored = os.pread(descriptor, _STATE.size, 0)
                free = _STATE.unpack(stored)[0] if len(stored) == _STATE.size else 0.0
                # A number that no pause explains is damage: believing it would stop the run.
                free, wait = change(free if abs(free - now) < 2 * _MAX_PAUSE_S else 0.0, now)
                os.pwrite(descriptor, _STATE.pack(free), 0)
                return wait
            except OSError:
                self._folder = None  # a full disk must not stop requests: from now on this process counts alone
                return 0.0
            finally:
                os.close(descriptor)  # gives the lock back

    def _open(self, host: str) -> int | None:
        if self._folder is None:
            return None
        import fcntl

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^a-z0-9.-]", "_", host.lower())
            descriptor = os.open(self._folder / f"{name}-{_boot_id()}.budget", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            self._folder = None
            return None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"
