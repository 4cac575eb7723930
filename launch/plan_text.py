"""Writes plans as text: what a layout takes, and the layouts that fit."""

import dataclasses
import math
from collections.abc import Mapping

from launch.plan_components import align
from moe.scaling.flops import run_active_parameters, run_recomputed_flops
from moe.scaling.hardware import Chip
from moe.scaling.layouts import Layout, cheapest_fit, with_gather_once
from moe.scaling.memory import StepBytes
from moe.scaling.roofline import estimate

GIB = 2**30
SHOWN_LAYOUTS = 10


def plan_lines(layout: Layout, chip: Chip) -> list[str]:
    """Returns a plan as lines: memory by kind, what is sent, and the time of a step."""
    return [
        "",
        f"{headline(layout, chip)}",
        "",
        *align(memory_rows(layout, chip)),
        fit_line(layout, chip),
        "",
        *align(collective_rows(layout)),
        *gather_lines(layout, chip),
        "",
        *align(time_rows(layout)),
        speed_line(layout),
        flops_line(layout),
    ]


def headline(layout: Layout, chip: Chip) -> str:
    """Returns which devices a layout is for, and how they are divided."""
    mesh = dataclasses.asdict(layout.estimate.mesh)
    devices = math.prod(mesh.values())
    divided = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
    train, model = layout.config.train, layout.config.model
    return (
        f"{devices} {chip.name} as {divided or 'one device'}; {train.batch_size} rows in "
        f"{train.accumulation} microbatches, remat={model.remat}: counted, not compiled"
    )


def memory_rows(layout: Layout, chip: Chip) -> list[tuple[str, ...]]:
    """Returns the table of a device's memory by kind."""
    memory = layout.estimate.memory
    kinds = {**dataclasses.asdict(memory), "total": memory.total}
    return share_rows("memory of a device", kinds, chip)


def share_rows(heading: str, parts: Mapping[str, int], chip: Chip) -> list[tuple[str, ...]]:
    """Returns a table of bytes by name, with their shares of a chip's memory."""
    rows = [(heading, "GiB", "of the chip")]
    for name, size in parts.items():
        rows.append((name, f"{size / GIB:.2f}", f"{100 * size / chip.memory_bytes:.1f} %"))
    return rows


def fit_line(layout: Layout, chip: Chip) -> str:
    """Returns whether a layout fits a chip, and otherwise what would make it fit."""
    memory, room = layout.estimate.memory, chip.memory_bytes
    if memory.total <= room:
        return f"It fits: {(room - memory.total) / GIB:.1f} of {room / GIB:.1f} GiB stay free."
    change = cheapest_fit(layout.config, layout.estimate.mesh, chip)
    return f"It does not fit {room / GIB:.1f} GiB; {fix_line(memory, change)}."


def fix_line(memory: StepBytes, change: str | None) -> str:
    """Returns the largest part of what does not fit, and what to set.

    `change` is that of `cheapest_fit`.
    """
    size = getattr(memory, memory.largest) / GIB
    fix = change or "other axes of the mesh, more devices, or a smaller model"
    return f"the largest part is {memory.largest}, {size:.1f} GiB: set {fix}"


def collective_rows(layout: Layout) -> list[tuple[str, ...]]:
    """Returns the table of the least that each device sends in a step."""
    rows = [("least sent in a step", "over", "what", "times", "GiB")]
    for collective in layout.estimate.collectives:
        rows.append(
            (
                collective.kind,
                ", ".join(collective.axes),
                collective.what,
                f"{collective.count:,.0f}",
                f"{collective.bytes / GIB:.3f}",
            )
        )
    return [*rows, ("total", "", "", "", f"{sent_bytes(layout) / GIB:.3f}")]


def sent_bytes(layout: Layout) -> float:
    """Returns the least that each device sends in a step."""
    return sum(collective.bytes for collective in layout.estimate.collectives)


def gather_lines(layout: Layout, chip: Chip) -> list[str]:
    """Returns what a step sends and takes if it gathers parameters once, if that helps and fits."""
    config = with_gather_once(layout.config, value=True)
    once = Layout(config, estimate(config, layout.estimate.mesh, chip))
    fits = once.estimate.memory.total <= chip.memory_bytes
    if not fits or sent_bytes(once) >= sent_bytes(layout):
        return []
    return [
        f"With train.gather_once=True it would send {sent_bytes(once) / GIB:.1f} GiB, and take "
        f"{once.estimate.memory.total / GIB:.1f} GiB of memory."
    ]


def time_rows(layout: Layout) -> list[tuple[str, ...]]:
    """Returns the table of what bounds a step's time."""
    seconds = layout.estimate.seconds
    return [("time of a step at least", "seconds")] + [
        (name, f"{value:.4g}") for name, value in sorted(seconds.items(), key=lambda x: -x[1])
    ]


def speed_line(layout: Layout) -> str:
    """Returns the estimated time of a step, its MFU, and what bounds it."""
    plan, train = layout.estimate, layout.config.train
    tokens = train.batch_size * layout.config.data.sequence_length
    return (
        f"A step takes at least {plan.step_seconds:.4g} s ({tokens / plan.step_seconds:,.0f} "
        f"tokens/s, MFU {100 * plan.mfu:.0f} %), bounded by {plan.bound}; "
        f"{train.steps:,} steps, {train.steps * plan.step_seconds / 3600:,.1f} hours."
    )


def flops_line(layout: Layout) -> str:
    """Returns the FLOPs of a step, as counted and by the usual rule of thumb."""
    config = layout.config
    tokens = config.train.batch_size * config.data.sequence_length
    thumb = 6 * run_active_parameters(config) * tokens
    again = ""
    if repeated := tokens * run_recomputed_flops(config):
        share = repeated / layout.estimate.model_flops
        again = f" (remat repeats {share:.0%} of them)"
    return (
        f"The model takes {layout.estimate.model_flops:.4g} FLOPs a step{again}; "
        f"6 x active parameters x tokens are {thumb:.4g}."
    )


def layout_lines(layouts: list[Layout]) -> list[str]:
    """Returns the table of the layouts that fit, and the flags of the best one."""
    rows = [("", "mesh", "remat", "microbatches", "gathers", "GiB", "seconds", "MFU", "bounded by")]
    for number, layout in enumerate(layouts[:SHOWN_LAYOUTS], 1):
        plan = layout.estimate
        mesh = dataclasses.asdict(plan.mesh)
        rows.append(
            (
                str(number),
                " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "-",
                layout.config.model.remat,
                str(layout.config.train.accumulation),
                "once" if layout.config.train.gather_once else "each",
                f"{plan.memory.total / GIB:.1f}",
                f"{plan.step_seconds:.4g}",
                f"{100 * plan.mfu:.0f} %",
                plan.bound,
            )
        )
    shown = min(SHOWN_LAYOUTS, len(layouts))
    return [
        "",
        f"{len(layouts)} layouts fit; the best {shown}, the shortest step first:",
        *align(rows),
        f"The first one: {layouts[0].flags}",
    ]
