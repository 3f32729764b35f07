"""Machines that need not be there: the devices of a TPU topology, or simulated ones on this machine's CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from omniopd_jax.types import InputError


class TopologyError(InputError):
    """A topology that is not known or cannot be described here."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one chip. A roofline is only as good as these."""

    name: str
    peak_flops: float  # bfloat16, a second
    memory_bytes: float
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that one chip sends along one dimension of the torus, both ways together
    source: str


_GIB = 2**30
# Interconnect: the published figure is all links of a chip, both directions, sending and receiving. A ring along one
# dimension of the torus uses two links; a chip sends half of what those carry.
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16 * _GIB, 819e9, 400e9 / 4, "docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 1200e9 / 6, "docs.cloud.google.com/tpu/docs/v5p-training"),
    "v6e": Chip("TPU v6e", 918e12, 32 * _GIB, 1600e9, 800e9 / 4, "docs.cloud.google.com/tpu/docs/v6e"),
}
_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
_CPU = re.compile(r"cpu:(\d+)")
_TPU = re.compile(r"(v\d\w*):(\d+(?:x\d+)*)")
LARGEST_CPU = 64


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named set of devices that programs can be compiled for."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None  # None: a CPU, of which no roofline is drawn

    @property
    def compute_dtype(self) -> str:
        """What `student.compute_dtype="auto"` means there."""
        return "float32" if self.chip is None else "bfloat16"


def check_name(name: str) -> None:
    """Raises TopologyError where the name cannot be one."""
    cpu, tpu = _CPU.fullmatch(name), _TPU.fullmatch(name)
    if cpu and 1 <= int(cpu[1]) <= LARGEST_CPU:
        return
    if tpu and tpu[1] in CHIPS and len(tpu[2].split("x")) == _DIMENSIONS[tpu[1]]:
        return
    raise TopologyError(
        f"--topology={name!r} is not known; it is cpu:N (N from 1 to {LARGEST_CPU}) or a TPU slice like v5e:8x8, "
        "v5p:2x2x2 or v6e:8x8."
    )


def set_environment(name: str) -> None:
    """Prepares a process for `topology(name)`; to be called before jax looks for devices.

    jax itself runs on the CPU, also where libtpu is installed; libtpu only describes and compiles.
    """
    check_name(name)
    import jax

    jax.config.update("jax_platforms", "cpu")
    cpu = _CPU.fullmatch(name)
    if cpu:
        flag = f"--xla_force_host_platform_device_count={cpu[1]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        return
    # libtpu otherwise asks a cloud machine's metadata server who it is, complains that nobody answers, and refuses to
    # be loaded by two processes, although none here touches a chip.
    for key, value in dict(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=f"{name.split(':')[0]}-8", TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0", TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3",
    ).items():  # fmt: skip
        os.environ.setdefault(key, value)


def topology(name: str) -> Topology:
    """The devices of a name, see `check_name`.

    Raises:
      TopologyError: libtpu is not installed, does not know the slice, or jax was started with too few CPU devices.
    """
    check_name(name)
    import jax

    cpu = _CPU.fullmatch(name)
    if cpu:
        devices = jax.devices("cpu")
        if len(devices) < int(cpu[1]):
            raise TopologyError(
                f"--topology={name}: jax started with {len(devices)} CPU devices; it needs "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={cpu[1]}."
            )
        return Topology(name, tuple(devices[: int(cpu[1])]), None)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology={name} needs libtpu, which compiles for TPUs that are not there: "
            "pip install 'omniopd_jax[plan]'."
        )
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # whatever libtpu raises for a slice that does not exist
        reason = str(error).split("\n")[0]
        raise TopologyError(f"--topology={name}: libtpu cannot describe this slice ({reason}).") from error
    return Topology(name, tuple(described.devices), CHIPS[name.split(":")[0]])
