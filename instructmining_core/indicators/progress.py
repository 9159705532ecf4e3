"""One bar for a whole scoring job: rows a second, real tokens a second, time left.

A row counts as done by parts, one for each indicator, as large as the indicator's share of the
time. What the bank had moves the bar and not its clock, so the time left is that of real work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm.auto import tqdm

from ..models.batching import TokenMeter
from . import Indicator

_MODEL_FREE = 0.02  # of the time of an indicator with a model, where no time was measured
_LEAST = 0.01  # of all time, so that no indicator's work leaves the bar where it is
_LOG_SECONDS = 30  # between two states of the bar in a log file


class Progress:
    """How far a job is.

    indicators : those that each row gets
    total : rows of the whole job, None where it is not known
    seconds : measured time of each indicator on some rows, None for a rough guess
    show : False for no bar
    """

    def __init__(
        self,
        indicators: Sequence[Indicator],
        total: int | None,
        *,
        seconds: Mapping[str, float] | None = None,
        show: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        stream = stream or sys.stderr
        self.shares = _shares(indicators, seconds)
        self.meter = TokenMeter(self._told)
        self.tokens, self.model_seconds = 0, 0.0
        self._since, self._working = 0.0, ""
        self.bar = tqdm(
            total=total, desc="score", unit="row", unit_scale=True, disable=not show, file=stream,
            mininterval=0.1 if stream.isatty() else _LOG_SECONDS, miniters=0, smoothing=0,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def done(self, indicator: str, rows: float, *, known: bool = False) -> None:
        """Move by the rows that an indicator has finished; `known`: they were in the bank."""
        part = rows * self.shares[indicator]
        if self.bar.disable:
            return
        if known:
            self.bar.initial += part  # not counted in the rate
        self.bar.update(part)

    @contextmanager
    def working(self, indicator: str) -> Iterator[None]:
        """While a model computes this indicator; tokens are counted against this time."""
        self._working, self._since = indicator, time.perf_counter()
        try:
            yield
        finally:
            self.model_seconds += time.perf_counter() - self._since

    def _told(self, tokens: int) -> None:
        self.tokens += tokens
        seconds = self.model_seconds + time.perf_counter() - self._since
        rate = self.tokens / max(seconds, 1e-9)
        self.bar.set_postfix_str(f"{self._working}, {rate:,.0f} tokens/s", refresh=False)
        if not self.bar.disable:
            self.bar.update(0)


def _shares(
    indicators: Sequence[Indicator], seconds: Mapping[str, float] | None
) -> dict[str, float]:
    """Each indicator's part of a row; they sum to 1."""
    if seconds and sum(seconds.values()) > 0:
        least = _LEAST * sum(seconds.values())
        cost = {one.name: max(seconds.get(one.name, 0.0), least) for one in indicators}
    else:
        cost = {
            one.name: _MODEL_FREE if one.role is None or one.role_optional else 1.0
            for one in indicators
        }
    whole = sum(cost.values())
    return {name: part / whole for name, part in cost.items()}
