"""One step's update, gathered while the teacher still works on other parts of its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from omniopd_jax.train import batching, sharding
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.pipeline import micro_batch, parts_learnt
from omniopd_jax.train.step import Sums
from omniopd_jax.types import TokenTree

if TYPE_CHECKING:
    from omniopd_jax.train.loop import Clock


class Update:
    """Takes a batch's weights in `parts_learnt` parts, then changes the experiment's state once.

    A batch that comes whole has gradients and update in one program, which needs no memory between the two.
    """

    def __init__(self, experiment: Experiment, clock: Clock):
        self.packed: list[TokenTree] = []  # what the devices computed, part by part; host arrays
        self._experiment = experiment
        self._clock = clock
        self._parts = parts_learnt(experiment.config)
        self._sums: Sums | None = None

    def add(self, tree: TokenTree) -> None:
        """The weights of some rows. Their gradients are under way when this returns."""
        with self._clock.phase("update"):
            groups = self._count(tree) * sharding.batch_shares(self._experiment.mesh)
            list_from = self._experiment.config.train.list_tokens_from
            self.packed.append(batching.pack(tree, groups=groups, list_from=list_from))
            if self._parts > 1:
                experiment, trees = self._experiment, self._on_devices(self.packed[-1])
                with jax.transfer_guard("disallow"):
                    self._sums = experiment.step.add(self._sums, experiment.state.params, trees)

    def apply(self) -> dict[str, float]:
        """Changes the state, and returns what the step says of itself."""
        experiment = self._experiment
        with self._clock.phase("update"):
            if self._sums is None:
                (whole,) = self.packed
                trees = self._on_devices(whole)
                # All that an update reads lies on the devices: none waits for the host.
                with jax.transfer_guard("disallow"):
                    experiment.state, metrics = experiment.step.whole(experiment.state, trees)
            else:
                with jax.transfer_guard("disallow"):
                    experiment.state, metrics = experiment.step.apply(experiment.state, self._sums)
            return {name: float(value) + 0.0 for name, value in batching.to_host(metrics).items()}

    def _count(self, tree: TokenTree) -> int:
        """Micro-batches of these rows."""
        shares = sharding.batch_shares(self._experiment.mesh)
        return len(tree.tokens_BxT) // micro_batch(self._experiment.config, shares)

    def _on_devices(self, packed: TokenTree) -> TokenTree:
        trees = batching.micro_batches(packed, self._count(packed))
        return batching.to_devices(trees, self._experiment.mesh, axis=1)
