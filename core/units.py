"""Numbers as people read them: sizes, durations, speeds, and a loss smoothed for the eye."""

from __future__ import annotations

from typing import overload

from core import i18n


def gigabytes(mb: float, least_mb: float = 1000) -> str:
    """Memory, from MiB: '812 MB', or '2.9 GB' from `least_mb` on."""
    return f"{mb / 1024:.1f} GB" if mb >= least_mb else f"{mb:.0f} MB"


def file_size(mb: float) -> str:
    """A download or file, from units of 10^6 bytes, as the hub counts: '812 MB', '2.9 GB'."""
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"


def duration(seconds: float) -> str:
    """75 -> '1:15'; 3675 -> '1:01:15'"""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def speed(steps_per_s: float) -> str:
    """'3.1 steps/s', or '5.0 s/step': slow runs read better the other way round."""
    if steps_per_s >= 1:
        return i18n.tr("terminal.steps_per_s", {"speed": f"{steps_per_s:.1f}"})
    return i18n.tr("terminal.s_per_step", {"speed": f"{1 / steps_per_s:.1f}"})


class MovingAverage:
    """Exponential moving average that is unbiased from the first value on, as Adam's moments are
    (Kingma & Ba 2015, arXiv 1412.6980). `weight` is the share of the newest value."""

    def __init__(self, weight: float) -> None:
        self.weight, self._sum, self._weights = weight, 0.0, 0.0

    @overload
    def add(self, value: float) -> float: ...
    @overload
    def add(self, value: None) -> float | None: ...

    def add(self, value: float | None) -> float | None:
        """The average with one more value. None (a loss that is not finite) changes nothing."""
        if value is not None:
            self._sum = (1 - self.weight) * self._sum + self.weight * value
            self._weights = (1 - self.weight) * self._weights + self.weight
        return self._sum / self._weights if self._weights else None
