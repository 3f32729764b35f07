"""How long a program takes at least, from public figures of the chip: three ceilings and no measurement.

compute   matrix products at the chip's bfloat16 peak
memory    bytes to and from main memory at its full bandwidth
network   bytes to other chips, as if each collective used one dimension of the torus, both ways

The time lies between the largest of the three (all of it overlaps) and their sum (nothing does). Neither bound knows
of latencies, of products too small to fill the units, or of other hosts' networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from omniopd_jax.plan.topology import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds under each ceiling."""

    compute: float
    memory: float
    network: float

    @property
    def at_best(self) -> float:
        """Everything overlaps."""
        return max(self.compute, self.memory, self.network)

    @property
    def at_worst(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.memory + self.network

    @property
    def bound_by(self) -> str:
        """The name of the largest."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(flops: float, moved: float, sent: Mapping[str, float], chip: Chip) -> Roofline:
    """One chip's work in one run of a program.

    Args:
      flops: of matrix products.
      moved: bytes to and from main memory.
      sent: bytes to other chips by axis of the mesh; axes take turns.
      chip: whose figures.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        memory=moved / chip.memory_bandwidth,
        network=sum(sent.values()) / chip.link_bandwidth,
    )
