"""Says what the devices of a mesh send each other in a training step."""

import dataclasses
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Says how much each device sends for one purpose in a step, and over which axes of the mesh.

    What a device keeps for itself is not sent. Over P devices, a gather or a scatter of R bytes in
    all sends (P - 1) / P of R from each device, and an all-reduce twice as much.
    """

    kind: Kind
    axes: tuple[str, ...]  # the axes of the mesh whose devices exchange with each other
    what: str  # what is sent, as a table names it
    bytes: float  # that one device sends in all executions of a step
    count: float  # how often it is executed in a step
