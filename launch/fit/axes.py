"""The axes, colours and marks that the figures of scaling laws share.

Sizes, tokens and FLOPs lie on logarithmic axes. Budgets have the shades of viridis, which people
with any colour vision can tell apart, without the end that is too close to the page's colour.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.plotting import Colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
DOT: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.5}
BAND = 0.22  # how strongly an interval is painted
ROOM = 46  # characters of ticks that a horizontal axis has room for beside a bar of shades
GAP = 1.5  # characters between the texts of two ticks

Text = Callable[[float], str]


def count_text(value: float, digits: int = 3) -> str:
    """Returns a number of parameters or tokens as people say it, such as 1.5M or 70B."""
    if value >= 1e15:
        return power_text(value)
    for size, suffix in SUFFIXES[1:]:
        # 999,999 is 1M: rounding to the digits may reach the next suffix.
        if float(f"{value:.{digits}g}") >= size:
            return f"{float(f'{value:.{digits}g}') / size:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def power_text(value: float, digits: int = 2) -> str:
    """Returns a number as a mantissa and a power of ten, such as 3.2×10¹⁹, or 10¹⁹ alone."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return power if float(mantissa) == 1 else f"{float(mantissa):g}×{power}"


def set_counts(axis: "Axis", label: str, low: float, high: float) -> None:
    """Makes an axis logarithmic, with ticks such as 20M, over counts from `low` to `high`."""
    _set_log(axis, low, high, count_text)
    axis.set_label_text(label)


def set_flops(axis: "Axis", label: str, low: float, high: float) -> None:
    """Makes an axis logarithmic, with ticks such as 10¹⁹, over FLOPs from `low` to `high`."""
    _set_log(axis, low, high, power_text)
    axis.set_label_text(label)


def set_rates(axis: "Axis", label: str, low: float, high: float) -> None:
    """Makes an axis logarithmic, with plain numbers as ticks, over learning rates."""
    _set_log(axis, low, high, lambda value: f"{value:g}")
    axis.set_label_text(label)


def set_losses(axis: "Axis", label: str, low: float, high: float) -> None:
    """Makes an axis logarithmic, with plain numbers as ticks, over losses."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    _set_scale(axis, low, high)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_label_text(label)


def _set_log(axis: "Axis", low: float, high: float, text: Text) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _set_scale(axis, low, high)
    is_horizontal = axis is axis.axes.xaxis
    axis.set_major_locator(FixedLocator(log_ticks(low, high, text if is_horizontal else None)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _set_scale(axis: "Axis", low: float, high: float) -> None:
    axes = axis.axes
    is_horizontal = axis is axes.xaxis
    (axes.set_xscale if is_horizontal else axes.set_yscale)("log")
    (axes.set_xlim if is_horizontal else axes.set_ylim)(low, high)


def log_ticks(low: float, high: float, text: Text | None = None, most: int = 7) -> list[float]:
    """Returns up to `most` round numbers in a range, evenly spread on a log axis.

    If the axis is horizontal, `text` writes a number, and the texts have room beside each other.
    There may be no number in a range that is narrower than the distance of two round numbers.
    """
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    rounds = [
        [step * 10.0**decade for decade in decades for step in steps]
        for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3))
    ]
    # Every decade, or every second one, and so on.
    rounds += [10.0 ** decades[decades % every == 0] for every in range(1, len(decades) + 1)]
    shown = ([float(tick) for tick in ticks if low <= tick <= high] for ticks in rounds)
    fits = lambda ticks: len(ticks) <= most and (not text or has_room(ticks, low, high, text))
    return next(filter(fits, shown))  # the last of them has one tick at most


def has_room(ticks: Sequence[float] | np.ndarray, low: float, high: float, text: Text) -> bool:
    """Returns whether the texts of neighbouring ticks of a horizontal log axis stay apart."""
    places = ROOM * np.log(np.array(ticks) / low) / np.log(high / low)
    lengths = np.array([len(text(tick)) for tick in ticks])
    return bool(np.all(np.diff(places) >= (lengths[1:] + lengths[:-1]) / 2 + GAP))


def tick_values(axes: "Axes", x: np.ndarray) -> None:
    """Puts the horizontal ticks on the values themselves, if these are few and far apart."""
    values = np.unique(x)
    if len(values) <= 10 and has_room(values, *axes.get_xlim(), count_text):
        axes.set_xticks(values)


def padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    """Returns the ends of a logarithmic axis that leaves a margin around positive values."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = max(share * np.log(high / low), 0.02)
    return low * float(np.exp(-margin)), high * float(np.exp(margin))


def shades(colours: Colours) -> "Colormap":
    """Returns viridis without the shades that the page's colour would swallow."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    is_dark = int(colours["card"][1:3], 16) < 128
    ends = (0.25, 0.97) if is_dark else (0.0, 0.82)
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(*ends, 256)))


def shade_by(colours: Colours, values: np.ndarray) -> "ScalarMappable":
    """Returns what maps positive values to a shade, on a logarithmic scale over the given ones."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    # A scale of one value would have no width.
    low, high = padded(values, 0.0)
    return ScalarMappable(LogNorm(low, high), shades(colours))


def shade_of(mapped: "ScalarMappable", value: float) -> np.ndarray:
    """Returns the shade of one value, as red, green, blue and opacity."""
    return mapped.to_rgba(np.array([value]))[0]


def add_bar(axes: "Axes", mapped: "ScalarMappable", label: str, text: Text) -> None:
    """Adds the bar that says which values the shades stand for."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bar = axes.figure.colorbar(mapped, ax=axes, label=label, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(FixedLocator(log_ticks(*mapped.get_clim())))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def round_levels(low: float, high: float, most: int = 12) -> list[float]:
    """Returns round numbers in a range, closer together where they are smaller.

    There are none in a range that is hardly one, as of a law whose loss is the same everywhere.
    """
    if not high > 1.001 * low:
        return []
    levels = np.geomspace(low, high, most)
    step = 10 ** np.floor(np.log10(levels[1] - levels[0]))
    return sorted({float(f"{round(level / step) * step:.6g}") for level in levels})


def diamonds(axes: "Axes", x: Any, y: Any, fill: str, edge: str, label: str | None) -> None:
    """Marks points by diamonds, over everything else."""
    style: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 6, "zorder": 5}
    style |= {"markerfacecolor": fill, "markeredgecolor": edge, "markeredgewidth": 1.1}
    axes.plot(x, y, label=label, **style)
