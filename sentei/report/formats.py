"""Numbers as a reader wants them: three or four digits, with their unit."""

from __future__ import annotations

from sentei.report.reading import Measurement

MISSING = "-"


def count(value: float | None) -> str:
    """Parameters or tokens: 134.5 M."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}" if abs(value) < 1e3 * size else f"{value / size:,.0f} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes, in powers of ten as disks and `ls --si` count them."""
    if value is None:
        return MISSING
    for unit_size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit_size:
            return f"{_digits(value / unit_size)} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 1:
        return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{_digits(value * 1e3)} ms"
    if value < 100:
        return f"{_digits(value)} s"
    if value < 3600:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value / 3600:.1f} h"


def percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def change(ratio: float | None) -> str:
    """child / parent as a change: 0.8 -> -20.0 %."""
    return MISSING if ratio is None else f"{100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def points(difference: float) -> str:
    """A difference of accuracies, fractions of 1."""
    return f"{100 * difference:+.1f} points".replace("-", "\N{MINUS SIGN}")


def times(ratio: float | None) -> str:
    if ratio is None:
        return MISSING
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}" if ratio < 100 else f"{ratio:,.0f}\N{MULTIPLICATION SIGN}"


def plain(value: float | None) -> str:
    """A number of no particular kind."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return _digits(value) if 1e-3 <= abs(value) < 1e7 else f"{value:.3g}"


def measured(measurement: Measurement | None) -> str:
    """A value of evaluation with its standard error: accuracies in percent."""
    if measurement is None:
        return MISSING
    if is_fraction(measurement):
        error = "" if measurement.stderr is None else f" \N{PLUS-MINUS SIGN} {100 * measurement.stderr:.1f}"
        return f"{100 * measurement.value:.1f}{error}"
    error = "" if measurement.stderr is None else f" \N{PLUS-MINUS SIGN} {plain(measurement.stderr)}"
    return (f"{measurement.value:.2f}" if abs(measurement.value) < 100 else plain(measurement.value)) + error


def is_fraction(measurement: Measurement) -> bool:
    return not measurement.lower_is_better and 0 <= measurement.value <= 1


def compared(child: Measurement, parent: Measurement) -> str:
    """What became of the parent's value: points for accuracies, a factor for perplexities."""
    if is_fraction(child) and is_fraction(parent):
        return points(child.value - parent.value)
    if parent.value > 0 and child.value > 0:
        return times(child.value / parent.value)
    return f"{child.value - parent.value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
