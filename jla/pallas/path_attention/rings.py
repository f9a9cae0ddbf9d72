"""Rings of SMEM tiles between the warpgroup that loads and the two that compute."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.scratch import barrier_for

COMPUTING = 2  # warpgroups that hand a tile back


def barriers(loads, stages):
    """Those of a ring, `loaded` and `used`: of its loads, and of the warpgroups that read them."""
    used = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    return barrier_for(loads, stages), used


@dataclasses.dataclass(frozen=True)
class Ring:
    """`loaded` and `used` of `barriers`, for each slot. The first tile has number `first`."""

    loaded: Any
    used: Any
    first: int = 0  # or 1

    @property
    def stages(self):
        return self.loaded.shape[0]

    def slot(self, n):
        """The slot of tile n."""
        return lax.rem(n, jnp.int32(self.stages))

    def free(self, n):
        """The slot of tile n, when what was in it has been handed back: the loader's side."""
        slot = self.slot(n)
        self.reuse(n, slot)
        return slot

    def reuse(self, n, slot):
        """Waits until the slot of tile n has been handed back, if it has been in use."""
        again = n > self.stages if self.first else n >= self.stages
        pl.when(again)(lambda: plgpu.barrier_wait(self.used.at[slot]))

    def wait(self, slot):
        """Waits for a slot's loads: the computing side."""
        plgpu.barrier_wait(self.loaded.at[slot])

    def hand_back(self, slot):
        """Says that this warpgroup has read the slot's tile."""
        mosaic.hand_back(self.used.at[slot])

    def drain(self, count):
        """What the loader does at its end, after `count` tiles; see `mosaic.drain`."""
        mosaic.drain(self.used, self.stages, self.first, count)
