"""The figures of what a run's routers have learnt, from the routing.json of `launch.routing`."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.plotting import (
    Colours,
    Drawing,
    add_colour_bar,
    line_shades,
    name_rows,
    place_legend,
    ratio_shades,
    set_shares,
    set_steps,
    set_whole_ticks,
    share_shades,
)
from moe.config import ConfigError
from moe.storage.paths import RunPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Results = Mapping[str, Any]  # what routing.json holds

MAX_LAYERS = 4  # the most layers that are drawn, at even distances; the tables have all
LARGEST_RATIO = 4  # the multiple of the even share at which the colours end


def read_results(path: RunPath) -> dict[str, Any]:
    """Returns what a routing.json holds.

    Raises ConfigError where that is not what launch.routing writes.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        is_whole = _is_whole(results)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"{path} is not what launch.routing writes: run launch.routing again, or delete {path}"
        )
    return results


def _is_whole(results: Results) -> bool:
    """Whether the results have all that is drawn, in arrays of the right shapes.

    The file may hold anything. For missing names or wrong types this raises ValueError, TypeError,
    AttributeError or KeyError.
    """
    layers, experts = len(results["layers"]), results["num_experts"]
    arrays = [
        (results["load"], (layers, experts)),
        (results["coactivation"], (layers, experts, experts)),
    ]
    arrays += [(values["share"], (layers, experts)) for values in results["classes"].values()]
    arrays += [(values, (layers,)) for values in results["saturation"].values()]
    arrays += [(results["vocabulary"][name], (layers,)) for name in ("mean", "by_load")]
    for step in results["saturation"]:
        int(step)
    numbers = [results[name] for name in ("step", "tokens", "experts_per_token")]
    return all(isinstance(number, int) for number in numbers) and all(
        np.array(values, float).shape == shape for values, shape in arrays
    )


def drawings(results: Results) -> list[Drawing]:
    """Returns the figures that have something to show."""
    layers = results["layers"]
    # The places of the drawn layers among all sparse ones.
    chosen = np.unique(np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)).tolist()
    title = "Load of the experts on held-out text"
    found = [Drawing("load", title, functools.partial(_draw_load, results))]
    for index in chosen:
        stem, title = f"classes_{layers[index]}", f"Token classes in layer {layers[index]}"
        found.append(Drawing(stem, title, functools.partial(_draw_classes, results, index)))
    for index in chosen:
        pairs_EE = np.array(results["coactivation"][index], float)
        np.fill_diagonal(pairs_EE, np.nan)  # every token that chose an expert chose that expert
        if np.nansum(pairs_EE) > 0:  # with one expert per token there are no pairs
            stem, title = f"coactivation_{layers[index]}", f"Co-activation in layer {layers[index]}"
            found.append(Drawing(stem, title, functools.partial(_draw_pairs, pairs_EE)))
    title = "Vocabulary specialisation"
    found.append(Drawing("vocabulary", title, functools.partial(_draw_vocabulary, results)))
    if results["saturation"]:
        title = f"Saturation towards step {results['step']:,}"
        paint = functools.partial(_draw_saturation, results, chosen)
        found.append(Drawing("saturation", title, paint))
    return found


def _draw_load(results: Results, axes: "Axes", colours: Colours) -> None:
    ratios_LE = np.array(results["load"]) * results["num_experts"]
    _draw_ratios(axes, ratios_LE, "load / even load", colours)
    axes.set_ylabel("layer")
    name_rows(axes, [str(layer) for layer in results["layers"]])


def _draw_classes(results: Results, index: int, axes: "Axes", colours: Colours) -> None:
    shares = np.array([values["share"][index] for values in results["classes"].values()])
    _draw_ratios(axes, shares * results["num_experts"], "share of the class / even share", colours)
    axes.set_ylabel("token class")
    name_rows(axes, list(results["classes"]))


def _draw_ratios(axes: "Axes", ratios: np.ndarray, label: str, colours: Colours) -> None:
    """Draws ratios to the even share, on a logarithmic scale that ends at LARGEST_RATIO."""
    limit = math.log2(LARGEST_RATIO)
    shown = np.log2(np.clip(ratios, 1 / LARGEST_RATIO, LARGEST_RATIO))
    image = _draw_image(axes, shown, cmap=ratio_shades(colours), vmin=-limit, vmax=limit)
    ticks = np.arange(-limit, limit + 1)
    power_of_2 = lambda value, _: f"{2.0**value:g}"
    add_colour_bar(axes, image, label, extend="both", format=power_of_2, ticks=ticks)


def _draw_pairs(pairs_EE: np.ndarray, axes: "Axes", colours: Colours) -> None:
    # The scale ends at the largest share, since with many experts all shares are small.
    largest = np.nanmax(pairs_EE)
    image = _draw_image(axes, pairs_EE, cmap=share_shades(colours), vmin=0, vmax=largest)
    percent = lambda value, _: f"{100 * value:.3g}%"
    add_colour_bar(axes, image, "share of the row's tokens", format=percent)
    axes.set(xlabel="expert that was also chosen", ylabel="chosen expert")
    name_rows(axes, [str(expert) for expert in range(len(pairs_EE))], max_names=8)


def _draw_image(axes: "Axes", values: np.ndarray, **options: Any) -> "AxesImage":
    """Draws an array whose columns are experts, with options of `imshow`."""
    axes.set_xlabel("expert")
    set_whole_ticks(axes.xaxis)
    return axes.imshow(values, aspect="auto", interpolation="nearest", **options)


def _draw_vocabulary(results: Results, axes: "Axes", colours: Colours) -> None:
    layers, vocabulary = results["layers"], results["vocabulary"]
    lines = {
        "most frequent expert of an id": vocabulary["mean"],
        "most loaded expert": vocabulary["by_load"],
    }
    _draw_chance(results, axes, colours)
    _draw_lines(axes, layers, lines, [colours["first"], colours["second"]])
    axes.set(xlabel="layer", ylabel="share of tokens", xlim=(min(layers) - 0.5, max(layers) + 0.5))
    set_whole_ticks(axes.xaxis)


def _draw_saturation(
    results: Results, chosen: Sequence[int], axes: "Axes", colours: Colours
) -> None:
    rows = {int(step): values for step, values in results["saturation"].items()}
    rows[results["step"]] = [1.0] * len(results["layers"])  # a checkpoint agrees with itself
    steps = sorted(rows)
    lines = {
        f"layer {results['layers'][index]}": [rows[step][index] for step in steps]
        for index in chosen
    }
    _draw_chance(results, axes, colours)
    _draw_lines(axes, steps, lines, line_shades(colours, len(lines)))
    set_steps(axes, 1.02 * steps[-1])
    axes.set_ylabel("choices that are the same")


def _draw_chance(results: Results, axes: "Axes", colours: Colours) -> None:
    """Draws the share that experts drawn at random would have, as a dashed line."""
    share = results["experts_per_token"] / results["num_experts"]
    dashes = (0, (4, 3))
    axes.axhline(share, color=colours["muted"], linestyle=dashes, linewidth=1, label="at random")


def _draw_lines(
    axes: "Axes", x: Sequence[int], lines: Mapping[str, Sequence[float]], shades: Sequence[Any]
) -> None:
    """Draws lines of shares by their label, each in its shade."""
    # A share of 0 % or 100 % lies on the edge of the axes, which must not cut its dot in half.
    dots = {"marker": "o", "markersize": 3, "clip_on": False, "zorder": 3}
    for (label, values), shade in zip(lines.items(), shades, strict=True):
        axes.plot(x, values, color=shade, linewidth=1.6, label=label, **dots)
    set_shares(axes)
    place_legend(axes)
