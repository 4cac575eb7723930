"""Says beforehand what a run costs: its components, and what a layout takes on a chip.

Examples:
    python -m launch.plan --config=configs/dense_125m.py
    python -m launch.plan --config=configs/dense_tiny.py --compile
    python -m launch.plan --config=configs/dense_7b.py --chip=h200 --devices=64
    python -m launch.plan --estimate --config=configs/dense_7b.py --chip=h200 --devices=64
    python -m launch.plan --estimate --config=configs/moe_671b.py --chip=v5p --devices=1024 \\
        --config.train.accumulation=30
    python -m launch.plan --estimate --config=configs/dense_1b.py --chip=v5e --devices=64 --search
    python -m launch.plan --estimate --config=configs/dense_tiny.py --chip=cpu

Without --chip it prints the components that the config builds, with shapes, parameters and FLOPs,
and the bytes of a training state on each device of config.mesh. An axis of size -1 counts as one
device. --compile also compiles the training step for one device, and prints XLA's count of FLOPs.

With --chip it adds what the run takes on so many of these chips: the memory of a device by kind,
what each device must send in a step, and the time of a step at best, all counted from the config.
Then it compiles the real train step for a slice of these chips, and shows the program's memory and
what it sends, beside the least. The compiler comes with pip install '.[aot]'; without it the
program is one for virtual CPU devices, and marked as such. --estimate counts alone, in seconds. No
such chip is needed, and nothing is allocated. --search lists the layouts that fit, the shortest
step first, and plans the first one. The plan is also written as a page. docs/planning.md explains
each figure.

--chip=cpu measures this machine, which takes a minute, and predicts the time of a step on it.
"""

import math
from pathlib import Path

from absl import flags

from launch import command_line
from launch.output_paths import output_file
from launch.plan_components import compiled_flops, run_lines, summary
from launch.plan_page import plan_page
from launch.plan_program import StepProgram, compile_step, program_lines
from launch.plan_text import layout_lines, plan_lines
from launch.topologies import find_target
from moe.config import ConfigError, MeshConfig, RunConfig, check_layout
from moe.files import write_whole
from moe.scaling.hardware import CHIPS, Chip, find_chip
from moe.scaling.layouts import Layout, fitting_layouts, possible_meshes
from moe.scaling.memory import state_bytes
from moe.scaling.roofline import estimate


def count_devices(values: flags.FlagValues, config: RunConfig, chip: Chip | None) -> int:
    """Returns how many devices a plan is for. Raises ConfigError for flags that fit no plan.

    The chip is None for that of this machine, which is not measured yet.
    """
    devices = values.devices or math.prod(abs(size) for size in config.mesh.sizes)
    if chip is None and devices > 1:
        raise ConfigError(
            f"--chip=cpu measures this machine as one device, and the plan is for {devices}: "
            "set --devices=1, and config.mesh to one device"
        )
    if chip and not values.estimate:
        find_target(chip, devices)
    if not values.search:
        check_layout(config, config.mesh.resolve(devices))
    return devices


def find_layouts(config: RunConfig, devices: int, chip: Chip) -> list[Layout]:
    """Returns the layouts that fit so many chips, the best first. Raises ConfigError for none."""
    if layouts := fitting_layouts(config, devices, chip):
        return layouts
    train = config.train
    if not any(possible_meshes(config, devices)):
        raise ConfigError(
            f"--devices={devices} cannot split this model and train.batch_size={train.batch_size}: "
            f"set train.batch_size to a multiple of {devices}, or --devices to another number"
        )
    state = state_bytes(config, MeshConfig(data=1)).total
    needed = max(devices + 1, math.ceil(state / chip.memory_bytes))
    raise ConfigError(
        f"--devices={devices} of {chip.name} have no layout that fits: the training state takes "
        f"{state / 2**30:,.1f} GiB, and activations come on top: "
        f"set --devices to at least {needed}, or take a smaller model"
    )


def plan(
    values: flags.FlagValues, layouts: list[Layout], chip: Chip, devices: int, page: Path
) -> None:
    """Prints the plan of the first layout on so many chips, and writes its page."""
    if values.search:
        print("\n".join(layout_lines(layouts)))
    layout = layouts[0]
    print("\n".join(plan_lines(layout, chip)))
    write_whole(page, plan_page(layout, chip))
    if not values.estimate and values.chip != "cpu":
        program = _compile(layout, chip, devices)
        if program is not None:
            print("\n".join(program_lines(program, layout.estimate.collectives, chip)))
            write_whole(page, plan_page(layout, chip, program))
    print(f"The page is {values.page}")


def _compile(layout: Layout, chip: Chip, devices: int) -> StepProgram | None:
    """Returns the program of a layout's step, or says why there is none and returns None."""
    exchange, num_parts = layout.config.model.moe.exchange, layout.estimate.mesh.expert
    is_ragged = exchange == "ragged_all_to_all" and num_parts > 1
    if is_ragged and find_target(chip, devices).platform == "cpu":
        print(
            f"\nNot compiled, so the plan is an estimate: the compiler for {chip.name} is not "
            f"installed (pip install '.[aot]'), and CPUs have no {exchange}."
        )
        return None
    return compile_step(layout.config, chip, devices)


def main(values: flags.FlagValues) -> None:
    config = command_line.read_run_config(values.config)
    for name in ("devices", "estimate", "search", "page"):
        if values[name].present and values[name].value and not values.chip:
            raise ConfigError(
                f"--{name} plans for a chip, and none is named: add --chip={'|'.join(CHIPS)}|cpu"
            )
    if not values.chip:
        print_components(config, values.compile)
        return
    # All mistakes are told before the first line of the plan.
    chip = None if values.chip == "cpu" else find_chip(values.chip)
    devices, page = count_devices(values, config, chip), output_file("--page", values.page)
    if chip is None:
        from launch.plan_cpu import measure_cpu

        chip = measure_cpu()
    if values.search:
        layouts = find_layouts(config, devices, chip)
    else:
        layouts = [Layout(config, estimate(config, config.mesh.resolve(devices), chip))]
    print_components(config, values.compile)
    plan(values, layouts, chip, devices, page)


def print_components(config: RunConfig, is_compiled: bool) -> None:
    """Prints what the config builds, and XLA's count of its FLOPs if the step is compiled."""
    print(summary(config))
    print("\n".join(run_lines(config)))
    if is_compiled:
        print(f"compiled step: {compiled_flops(config):,.0f} FLOPs per token, by XLA's count")


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_bool("compile", False, "Whether to compile the step and print XLA's count too.")
    flags.DEFINE_string("chip", None, f"The chip to plan for: {', '.join(CHIPS)}, or cpu.")
    flags.DEFINE_integer(
        "devices",
        None,
        "How many devices there are, as JAX counts them; by default as many as config.mesh needs.",
        lower_bound=1,
    )
    flags.DEFINE_bool("estimate", False, "Whether to count alone, without compiling anything.")
    flags.DEFINE_bool("search", False, "Whether to list the layouts that fit, best first.")
    flags.DEFINE_string("page", "plan.html", "The file to write the plan's page to.")
    command_line.run(main, __doc__)
