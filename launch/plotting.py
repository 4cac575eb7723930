"""How figures of a run are drawn: their themes, their files, and the parts that they share.

Every figure exists as PNG files for light and for dark pages, and as a PDF file for papers. Within
a figure a family of lines or shares has one colour, and a stronger shade is a larger value. A
legend stands above the axes, where no line can pass under it.

Functions import matplotlib when they are called. Its import takes a second, and a command has to
answer bad input before that.
"""

import dataclasses
import html
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.series import Series, block_medians, keep_extremes
from moe.storage.paths import RunPath, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Colours = Mapping[str, str]  # a theme: colours by their role, as #rrggbb

# The page that shows the figures uses the same colours.
THEMES: dict[str, Colours] = {
    "light": {
        "text": "#24292f",
        "muted": "#656d76",
        "rule": "#e6e8eb",
        "card": "#ffffff",
        "first": "#2f6fb0",
        "second": "#d1711f",
        "third": "#1b8a6b",
        "alarm": "#c0392b",
    },
    "dark": {
        "text": "#dfe3e8",
        "muted": "#98a1ab",
        "rule": "#30363e",
        "card": "#1c2026",
        "first": "#76aee6",
        "second": "#eda766",
        "third": "#6cc9a9",
        "alarm": "#ef7f73",
    },
}
WIDTH, HEIGHT, DPI = 1120, 660, 224  # of a figure, in pixels
TITLE_LENGTH = 44  # characters for which a figure has room
MARGIN = 0.012  # between the figure's left edge and its title, as a part of the width


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure: its file name without theme and ending, its title, and how it is painted."""

    stem: str
    title: str
    paint: Callable[["Axes", Colours], None]


def style(colours: Colours) -> "dict[RcKeyType, Any]":
    """Returns matplotlib's settings for a figure in a theme's colours."""
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
        "pdf.fonttype": 42,  # TrueType: many journals refuse matplotlib's own Type 3
    }


def write_drawing(drawing: Drawing, directory: RunPath) -> None:
    """Writes a figure as one PNG file for each theme, and as a PDF file in light colours."""
    import matplotlib

    for theme, colours in THEMES.items():
        with matplotlib.rc_context(style(colours)), warnings.catch_warnings():
            # A metric may be named in a script that the font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure = paint_figure(drawing, colours)
            write_whole(directory / file_name(drawing, theme), as_png(figure))
            if theme == "light":
                write_whole(directory / pdf_name(drawing), as_pdf(figure))


def as_png(figure: "Figure") -> bytes:
    """Returns a figure as the bytes of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def as_pdf(figure: "Figure") -> bytes:
    """Returns a figure as the bytes of a PDF file, which are the same whenever it is made."""
    image = io.BytesIO()
    figure.savefig(image, format="pdf", metadata={"CreationDate": None})
    return image.getvalue()


def paint_figure(drawing: Drawing, colours: Colours) -> "Figure":
    """Returns the figure of a drawing in a theme's colours, under the settings of `style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    title = shorten(drawing.title)
    figure.suptitle(title, x=MARGIN, ha="left", fontsize=11, fontweight="bold")
    drawing.paint(axes, colours)
    return figure


def file_name(drawing: Drawing, theme: str) -> str:
    """Returns the name of a figure's PNG file for one theme."""
    return f"{drawing.stem}-{theme}.png"


def pdf_name(drawing: Drawing) -> str:
    """Returns the name of a figure's PDF file."""
    return f"{drawing.stem}.pdf"


def picture_html(drawing: Drawing) -> str:
    """Returns the HTML that shows a written figure, in the file for the reader's theme."""
    dark, light = file_name(drawing, "dark"), file_name(drawing, "light")
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" width={WIDTH} height={HEIGHT} alt="{html.escape(drawing.title)}">'
        "</picture>"
    )


def shorten(name: str, length: int = TITLE_LENGTH) -> str:
    """Returns a name, without its middle if it is longer than `length`."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2 - 1) :]}"


def draw_series(
    axes: "Axes", series: Series, label: str, colour: str, *, noisy: bool = True
) -> None:
    """Draws a metric over steps: a short series as a line with a dot for each value.

    A long series is drawn as a faint line, with a line of medians over it. If it is not `noisy`,
    such as a schedule, a line goes through every value, because medians would blur its jumps.
    """
    num_values = len(series.steps)
    line: dict[str, Any] = {"color": colour, "linewidth": 1.6, "label": label}
    if num_values <= 60:
        # A value that no line leads to has to be seen as a dot, also at the edge of the axes.
        is_alone = num_values == 1
        axes.plot(
            *series, **line, marker="o", markersize=6 if is_alone else 3, clip_on=not is_alone
        )
    elif noisy:
        # Behind the medians of all metrics of the figure, whose zorder is 2.
        axes.plot(*keep_extremes(series), color=colour, linewidth=0.7, alpha=0.35, zorder=1.5)
        axes.plot(*block_medians(series, min(80, num_values // 5)), **line)
    else:
        axes.plot(*keep_extremes(series), **line)


def draw_crosses(axes: "Axes", steps: Sequence[int], label: str, colour: str) -> None:
    """Marks steps by crosses at the foot of the axes."""
    heights = np.full(len(steps), 0.02)  # as parts of the axes' height
    cross = {"marker": "x", "markersize": 4.5, "linestyle": "none", "clip_on": False}
    transform = axes.get_xaxis_transform()
    axes.plot(steps, heights, color=colour, label=label, transform=transform, **cross)


def place_legend(axes: "Axes") -> None:
    """Puts a legend of two lines or more between the title and the axes."""
    from matplotlib.transforms import blended_transform_factory

    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    # Horizontally it starts at the figure's left edge, vertically above the axes.
    transform = blended_transform_factory(axes.figure.transFigure, axes.transAxes)
    axes.legend(
        handles,
        labels,
        ncols=len(handles),
        fontsize=8.5,
        loc="lower left",
        bbox_to_anchor=(MARGIN, 1.03),
        bbox_transform=transform,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.1,
    )


def set_steps(axes: "Axes", end: float) -> None:
    """Makes the horizontal axis one of steps, from 0 to `end`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlabel="step", xlim=(0, max(1, end)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def set_values(axes: "Axes", values: np.ndarray, *, log: bool) -> None:
    """Fits the vertical axis to finite values, logarithmic if `log` and the values allow it."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    plain = FuncFormatter(_plain)
    axes.yaxis.set_major_formatter(plain)
    if not len(values):
        axes.set_yticks([])
        return
    is_whole = bool(np.all(values == np.round(values)))
    few_ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=is_whole)
    positive = values[values > 0]
    # Around a single value a logarithmic axis would show decades.
    if log and len(positive) and positive.max() > positive.min():
        axes.set_yscale("log")
        is_narrow = positive.max() < 10 * positive.min()
        locator = few_ticks if is_narrow else LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)  # set_yscale has put its own there
        return
    axes.yaxis.set_major_locator(few_ticks)
    if 1e4 <= np.abs(values).max() < 1e15:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def set_percentages(axes: "Axes", values: np.ndarray) -> None:
    """Fits the vertical axis to finite percentages, from 0 on."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    if len(values):
        axes.set_ylim(0, 1.1 * max(values.max(), 0.1))  # a share of almost 0 stays at the bottom
    else:
        axes.set_yticks([])


def _plain(value: float, position: int | None) -> str:
    """Returns the text of a tick's number, with the arguments that FuncFormatter passes."""
    return f"{value:g}"


def set_shares(axes: "Axes") -> None:
    """Makes the vertical axis one of shares, from 0 % to 100 %."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def set_whole_ticks(axis: "Axis") -> None:
    """Puts ticks on a few whole numbers, for layers and experts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True))


def name_rows(axes: "Axes", names: Sequence[str], max_names: int = 16) -> None:
    """Names the rows of an image, or every n-th of them where `max_names` are exceeded."""
    every = -(-len(names) // max_names)
    axes.set_yticks(range(0, len(names), every), [shorten(name, 24) for name in names[::every]])


def ratio_shades(colours: Colours) -> "Colormap":
    """Returns the colours of ratios to an even share.

    The even share, in the middle, has the page's colour. Smaller shares have more of the first
    colour, and larger ones more of the second.
    """
    from matplotlib.colors import LinearSegmentedColormap

    ends = [colours["first"], colours["card"], colours["second"]]
    # The number of shades is odd, so that one of them is the even share's.
    shades = LinearSegmentedColormap.from_list("ratio", ends, N=255)
    return shades.with_extremes(bad=colours["muted"])


def share_shades(colours: Colours) -> "Colormap":
    """Returns the colours of shares: the page's for 0, which fades to the first colour."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("share", [colours["card"], colours["first"]])
    return shades.with_extremes(bad=colours["rule"])


def line_shades(colours: Colours, number: int) -> list[Any]:
    """Returns the colours of an ordered family of lines, from faint to full."""
    return list(share_shades(colours)(np.linspace(0.45, 1, number) if number > 1 else [1.0]))


def add_colour_bar(axes: "Axes", image: "ScalarMappable", label: str, **options: Any) -> None:
    """Adds the bar that says what the shades of an image mean, with options of `colorbar`."""
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, label=label, **options)
    bar.outline.set_visible(False)
