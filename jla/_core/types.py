"""Types of the public functions' arguments and results. `jla._core.axes` explains the letters.

Each name stands for an array's part in a mechanism, and the comment gives its axes. A checker knows
no axes: to it every argument is an array, JAX's or NumPy's, and every result is JAX's. The axes of
runs are given; a step's arguments are the same without T.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from numpy.typing import NDArray

# The implementations that can be asked for by name; None, the fastest, is no name.
Implementation = Literal["reference", "xla", "pallas", "triton"]

type NumpyArray = NDArray[Any]
type Array = jax.Array | NumpyArray  # what a public function takes; it returns jax.Array
type Sizes = dict[str, int]  # an axis letter's size; under jax.export a symbolic dimension

# Arguments of several mechanisms.
type Queries = Array  # [B, T, H, K], [B, T, HQ, K] or [B, T, HK, K]
type Keys = Array  # [B, T, H, K] or [B, T, HK, K]
type Values = Array  # [B, T, H, V] or [B, T, HV, V]
# g, float32, at most 0: [B, T, HV, K] (kda), [B, T, H, M] (gsa), [B, T, HQ] (PaTH) or [B, T, H].
type LogDecays = Array
type Strengths = Array  # beta: [B, T, H] or [B, T, HV]
type SegmentIds = Array  # [B, T], integers: equal neighbours are one segment
type Slots = Array  # [B], int32: the row of a pool for each row of a step, or -1 for none

# Arguments of one mechanism.
type SlotWrites = Array  # gsa's s: [B, T, H, M]
type LevelScales = Array  # log-linear attention: [B, T, H, L]
type Directions = Array  # PaTH's w: [B, T, H, K], rows of length 1
type Ridge = Array  # MesaNet's lamb: [H, K], float32, above 0
type RawGates = Array  # what kda_gate makes decays of: [..., HV, K]
type GateRates = Array  # kda_gate's A_log: [HV], float32
type GateBiases = Array  # kda_gate's dt_bias: [HV, K], float32

# Results, and the arrays of states.
type Outputs = jax.Array  # [B, T, H, V], [B, T, HQ, V] or [B, T, HV, V], of v's dtype
type KDAState = jax.Array  # [B, HV, K, V], float32
type SlotKeys = jax.Array  # [B, H, K, M], float32
type SlotValues = jax.Array  # [B, H, M, V], float32
type Levels = jax.Array  # [B, H, L, K, V], float32
type LevelDecays = jax.Array  # [B, H, L], float32
type Positions = jax.Array  # [B], int32
type KeyProducts = jax.Array  # [B, H, K, K], float32
type ValueProducts = jax.Array  # [B, H, K, V], float32
type CachedKeys = jax.Array  # [B, S, H, K], float32
type CachedValues = jax.Array  # [B, S, H, V], of v's dtype
type CachedDecays = jax.Array  # [B, S, HQ], float32
type RecentKeys = jax.Array  # [B, 64, H, K], float32
type MapChanges = jax.Array  # [B, H, K, K], float32
type Lengths = jax.Array  # [B], int32

# One array, or a NamedTuple of arrays of which some may be missing: what a step takes and returns.
type State = jax.Array | tuple[jax.Array | None, ...]


def jitted[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`jax.jit(function)`, of the function's type: to a checker JAX's own returns anything."""
    return jax.jit(function)
