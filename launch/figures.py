"""What all figures of a run share: their themes, their size, and how lines, shares and legends are
drawn.

A family of lines or shares has one colour, and within it a shade says how much: the larger the
stronger. A legend stands above the axes, where no line can pass under it. matplotlib is imported
where it is used: it takes a second, in which bad input is answered.
"""

import dataclasses
import html
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

# Every figure is drawn once for light and once for dark pages. The colours are those of the page.
_ROLES = ("text", "muted", "rule", "card", "first", "second", "third", "alarm")
THEMES = {
    "light": dict(
        zip(
            _ROLES,
            (
                "#24292f",
                "#656d76",
                "#e6e8eb",
                "#ffffff",
                "#2f6fb0",
                "#d1711f",
                "#1b8a6b",
                "#c0392b",
            ),
            strict=True,
        )
    ),
    "dark": dict(
        zip(
            _ROLES,
            (
                "#dfe3e8",
                "#98a1ab",
                "#30363e",
                "#1c2026",
                "#76aee6",
                "#eda766",
                "#6cc9a9",
                "#ef7f73",
            ),
            strict=True,
        )
    ),
}
TITLE_LENGTH = 44  # characters for which a figure has room
MARGIN = 0.012  # where titles and legends begin, as a part of the figure's width


def style(colours: Mapping[str, str]) -> dict[str, Any]:
    """Matplotlib's settings for a figure in the colours of a theme."""
    return {
        "figure.facecolor": colours["card"],
        "axes.facecolor": colours["card"],
        "axes.edgecolor": colours["rule"],
        "axes.titlecolor": colours["text"],
        "text.color": colours["text"],
        "axes.labelcolor": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "legend.labelcolor": colours["text"],
        "grid.color": colours["rule"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.titlepad": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 9.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.parse_math": False,  # a metric's name may have a $
    }


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure: its file's name without theme and ending, a title, and what draws it on axes in a
    theme's colours.
    """

    stem: str
    title: str
    paint: Callable[["Axes", Mapping[str, str]], None]


def write_drawing(drawing: Drawing, directory: Path) -> None:
    """Writes a figure as PNG files of 1120 x 660 pixels, one for each theme."""
    import matplotlib
    from matplotlib.figure import Figure

    for theme, colours in THEMES.items():
        with matplotlib.rc_context(style(colours)), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Glyph .* missing from", UserWarning
            )  # of a name in a script that the font lacks
            figure, image = (
                Figure(figsize=(5, 660 / 224), dpi=224, layout="constrained"),
                io.BytesIO(),
            )
            axes = figure.subplots()
            figure.suptitle(
                shorten(drawing.title), x=MARGIN, ha="left", fontsize=11, fontweight="bold"
            )
            drawing.paint(axes, colours)
            figure.savefig(image, format="png")
        write_whole(directory / f"{drawing.stem}-{theme}.png", image.getvalue())


def picture(drawing: Drawing) -> str:
    """The HTML of a written figure: the reader's theme decides which file is shown."""
    return (
        f'<picture><source srcset="{drawing.stem}-dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="{drawing.stem}-light.png" width=1120 height=660 alt="{html.escape(drawing.title)}"></picture>'
    )


def shorten(name: str, length: int = TITLE_LENGTH) -> str:
    """A name without its middle, where it is too long for a figure."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2 - 1) :]}"


def place_legend(axes: "Axes") -> None:
    """Puts a legend of two lines or more between the title and the axes, at the figure's left edge."""
    from matplotlib.transforms import blended_transform_factory

    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (MARGIN, 1.03)}
        place["bbox_transform"] = blended_transform_factory(axes.figure.transFigure, axes.transAxes)
        gaps = {
            "borderpad": 0,
            "borderaxespad": 0,
            "handlelength": 1.2,
            "handletextpad": 0.5,
            "columnspacing": 1.1,
        }
        axes.legend(handles, labels, ncols=len(handles), fontsize=8.5, **place, **gaps)


def set_steps(axes: "Axes", end: float) -> None:
    """Makes the horizontal axis one of steps, from 0 to `end`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlabel="step", xlim=(0, max(1, end)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def ratio_shades(colours: Mapping[str, str]) -> "Colormap":
    """Colours of ratios to an even share: the page's for 1, the first family for less and the
    second for more.
    """
    from matplotlib.colors import LinearSegmentedColormap

    # An odd number of shades, so that one of them is the even share's.
    shades = LinearSegmentedColormap.from_list(
        "ratio", [colours[role] for role in ("first", "card", "second")], N=255
    )
    return shades.with_extremes(bad=colours["muted"])


def share_shades(colours: Mapping[str, str]) -> "Colormap":
    """Colours of shares: the page's for 0, and the first family for more."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "share", [colours["card"], colours["first"]]
    ).with_extremes(bad=colours["rule"])


def line_shades(colours: Mapping[str, str], number: int) -> list[Any]:
    """Colours of an ordered family of lines, from faint to full."""
    return list(share_shades(colours)(np.linspace(0.45, 1, number) if number > 1 else [1.0]))


def add_bar(axes: "Axes", image: "ScalarMappable", label: str, **options: Any) -> None:
    """Adds the bar that says what the shades of an image mean."""
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, label=label, **options)
    bar.outline.set_visible(False)


def name_rows(axes: "Axes", names: Sequence[str], most: int = 16) -> None:
    """Names the rows of an image, or every so many of them where they are more than `most`."""
    every = -(-len(names) // most)
    axes.set_yticks(range(0, len(names), every), [shorten(name, 24) for name in names[::every]])
