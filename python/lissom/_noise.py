"""Whether other processes disturb a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["NOISY_CORES", "ForeignCores"]

NOISY_CORES = 0.1
"""Other processes busy on more than this many cores spoil a measurement."""


class ForeignCores:
    """Cores that other processes (and, in a virtual machine, its host) keep busy from now on."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._busy, self._own = _busy_seconds(), time.process_time()

    def mean(self) -> float | None:
        """The mean number until now; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = (busy - self._busy) - (time.process_time() - self._own)
        return max(0.0, foreign) / (time.perf_counter() - self._begin)


def _busy_seconds() -> float | None:
    """CPU seconds that the whole machine has spent on anything but idling, stolen time included."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
