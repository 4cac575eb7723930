"""The figures of what a run's routers have learnt, drawn from the routing.json that
`launch.routing` writes.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.figures import (
    Drawing,
    add_bar,
    line_shades,
    name_rows,
    place_legend,
    ratio_shades,
    set_steps,
    share_shades,
)
from moe.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colours = Mapping[str, str]
Results = Mapping[str, Any]

DRAWN_LAYERS = 4  # of many layers, so many are drawn, at even distances; the tables have all
LARGEST_RATIO = 4  # times the even share, where colours end


def read_results(path: Path) -> dict[str, Any]:
    """What a routing.json holds. Raises ConfigError where it is not what launch.routing writes."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        layers, experts = len(results["layers"]), results["num_experts"]
        arrays = [
            (results["load"], (layers, experts)),
            (results["coactivation"], (layers, experts, experts)),
        ]
        arrays += [(values["share"], (layers, experts)) for values in results["classes"].values()]
        arrays += [(values, (layers,)) for values in results["saturation"].values()]
        arrays += [(results["vocabulary"][name], (layers,)) for name in ("mean", "by_load")]
        whole = all(np.array(values, float).shape == shape for values, shape in arrays) and all(
            map(int, results["saturation"]) or [True]
        )
        whole = whole and all(
            isinstance(results[name], int) for name in ("step", "tokens", "experts_per_token")
        )
    except (ValueError, TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise ConfigError(
            f"{path} is not what launch.routing writes: run launch.routing again, or delete {path}"
        )
    return results


def drawings(results: Results) -> list[Drawing]:
    """The figures that have something to show: load, token classes and co-activation by layer,
    vocabulary and saturation.
    """
    layers, num_experts = results["layers"], results["num_experts"]
    drawn = np.unique(np.linspace(0, len(layers) - 1, DRAWN_LAYERS).round().astype(int))
    found = [
        Drawing(
            "load", "Load of the experts on held-out text", functools.partial(_draw_load, results)
        )
    ]
    for index in drawn:
        title = f"Token classes in layer {layers[index]}"
        found.append(
            Drawing(
                f"classes_{layers[index]}", title, functools.partial(_draw_classes, results, index)
            )
        )
    for index in drawn:
        pairs_EE = np.where(
            np.eye(num_experts), np.nan, np.array(results["coactivation"][index], float)
        )
        if np.nansum(pairs_EE) > 0:  # with one expert per token there are no pairs
            title = f"Co-activation in layer {layers[index]}"
            found.append(
                Drawing(
                    f"coactivation_{layers[index]}", title, functools.partial(_draw_pairs, pairs_EE)
                )
            )
    found.append(
        Drawing(
            "vocabulary", "Vocabulary specialisation", functools.partial(_draw_vocabulary, results)
        )
    )
    if results["saturation"]:
        title = f"Saturation towards step {results['step']:,}"
        found.append(
            Drawing("saturation", title, functools.partial(_draw_saturation, results, drawn))
        )
    return found


def _draw_load(results: Results, axes: "Axes", colours: Colours) -> None:
    ratios_LE = np.array(results["load"]) * results["num_experts"]
    _draw_ratios(axes, ratios_LE, "load / even load", colours)
    axes.set_ylabel("layer")
    name_rows(axes, [str(layer) for layer in results["layers"]])


def _draw_classes(results: Results, index: int, axes: "Axes", colours: Colours) -> None:
    ratios_CE = (
        np.array([values["share"][index] for values in results["classes"].values()])
        * results["num_experts"]
    )
    _draw_ratios(axes, ratios_CE, "share of the class / even share", colours)
    axes.set_ylabel("token class")
    name_rows(axes, list(results["classes"]))


def _draw_ratios(axes: "Axes", ratios: np.ndarray, label: str, colours: Colours) -> None:
    """Ratios to the even share in colour, on a logarithmic scale that ends at LARGEST_RATIO."""
    limit = math.log2(LARGEST_RATIO)
    shown = np.log2(np.clip(ratios, 1 / LARGEST_RATIO, LARGEST_RATIO))
    image = _draw_image(axes, shown, cmap=ratio_shades(colours), vmin=-limit, vmax=limit)
    add_bar(
        axes,
        image,
        label,
        extend="both",
        format=lambda value, _: f"{2.0**value:g}",
        ticks=np.arange(-limit, limit + 1),
    )


def _draw_pairs(pairs_EE: np.ndarray, axes: "Axes", colours: Colours) -> None:
    # The scale ends at the largest share: with many experts all shares are small.
    image = _draw_image(
        axes, pairs_EE, cmap=share_shades(colours), vmin=0, vmax=np.nanmax(pairs_EE)
    )
    add_bar(axes, image, "share of the row's tokens", format=lambda value, _: f"{100 * value:.3g}%")
    axes.set(xlabel="expert that was also chosen", ylabel="chosen expert")
    name_rows(axes, [str(expert) for expert in range(len(pairs_EE))], most=8)


def _draw_image(axes: "Axes", values: np.ndarray, **options: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return axes.imshow(values, aspect="auto", interpolation="nearest", **options)


def _draw_vocabulary(results: Results, axes: "Axes", colours: Colours) -> None:
    from matplotlib.ticker import MaxNLocator

    layers, vocabulary = results["layers"], results["vocabulary"]
    lines = {
        "most frequent expert of an id": vocabulary["mean"],
        "most loaded expert": vocabulary["by_load"],
    }
    _draw_shares(results, axes, layers, lines, [colours["first"], colours["second"]], colours)
    axes.set(xlabel="layer", ylabel="share of tokens", xlim=(min(layers) - 0.5, max(layers) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_saturation(
    results: Results, drawn: Sequence[int], axes: "Axes", colours: Colours
) -> None:
    rows = {int(step): values for step, values in results["saturation"].items()} | {
        results["step"]: [1.0] * len(results["layers"])
    }
    steps = sorted(rows)
    lines = {
        f"layer {results['layers'][index]}": [rows[step][index] for step in steps]
        for index in drawn
    }
    _draw_shares(results, axes, steps, lines, line_shades(colours, len(lines)), colours)
    set_steps(axes, 1.02 * steps[-1])
    axes.set_ylabel("choices that are the same")


def _draw_shares(
    results: Results,
    axes: "Axes",
    x: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    shades: Sequence[Any],
    colours: Colours,
) -> None:
    """Lines of shares, and the share that experts drawn at random would have."""
    from matplotlib.ticker import PercentFormatter

    even = results["experts_per_token"] / results["num_experts"]
    axes.axhline(
        even, color=colours["muted"], linestyle=(0, (4, 3)), linewidth=1, label="at random"
    )
    for (label, values), shade in zip(lines.items(), shades, strict=True):
        axes.plot(
            x,
            values,
            color=shade,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=label,
            clip_on=False,
            zorder=3,
        )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    place_legend(axes)
