"""What came of a case: a row for each figure, and whether this server met the bar that the figure sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.processes import Failed


@dataclass(frozen=True)
class Row:
    """Someone's figure, and how ours compares: `ratio` is ours divided by it. No bar, and `met` is None."""

    who: str
    figure: str
    latency: str = ""
    ratio: float | None = None
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """The rows of one case, ours first."""

    case: str
    rows: Sequence[Row]

    @property
    def met(self) -> bool:
        return all(row.met is not False for row in self.rows)


def void(case: str, error: Exception) -> Outcome:
    """The outcome of a case that went wrong."""
    return Outcome(case, [Row("", void_text(str(error)), met=False)])


def or_void(case: str, measure: Callable[[], Outcome]) -> Outcome:
    """What `measure` returns, or what says that it went wrong."""
    try:
        return measure()
    except Failed as error:
        return void(case, error)


def void_text(reason: str) -> str:
    return f"void: {' '.join(reason.split())[:300]}"


def at_least(ratio: float | None, least: float) -> tuple[str, bool]:
    """The bar in words, and whether `ratio` meets it; one that could not be measured doesn't."""
    return f"≥ {least:g} ×", ratio is not None and ratio >= least


def at_most(ratio: float | None, most: float) -> tuple[str, bool]:
    return f"≤ {most:g} ×", ratio is not None and ratio <= most
