"""Kernels' operands, results, scratch and loads by name: jla/pallas/common/scratch.py."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import scratch

SDS = jax.ShapeDtypeStruct
TILE = plgpu.SMEM((64, 64), jnp.float32)


def trace(loads, *, y=None, partial=False):
    """Traces a kernel whose one load arrives at a barrier for `loads`; returns its body's refs."""
    seen = []

    def body(refs):
        seen.append(refs)
        pair = refs.x[0].at[0], refs.either.first
        scratch.fetch(dict(x=pair, y=None), refs.loaded, partial=partial)

    def run(x, y):
        return scratch.kernel(
            body,
            inputs=dict(y=y, x=(x, x)),
            outputs=dict(absent=None, o=SDS(x.shape, x.dtype)),
            scratch=dict(
                absent_tile=None,
                either=dict(first=TILE, second=plgpu.SMEM((8, 64), jnp.float16)),
                loaded=scratch.barrier_for(loads),
            ),
            in_place=dict(y="o") if y is not None else None,
        )

    out = jax.eval_shape(run, SDS((1, 64, 64), jnp.float32), y)
    assert out.absent is None and out.o.shape == (1, 64, 64)
    return seen[0]


@pytest.mark.parametrize("loads", [["x"], dict(x=1, y=False)], ids=str)
def test_names(loads):
    refs = trace(loads)
    assert refs.y is None and refs.absent is None and refs.absent_tile is None
    assert len(refs.x) == 2 and refs.either.second.shape == (8, 64)
    assert trace(loads, y=SDS((1, 64, 64), jnp.float32)).y.shape == (1, 64, 64)


def test_a_barrier_for_other_loads_is_refused():
    message = r"`loads` has 1 copies \(x\) and `barrier` awaits 2; declare it as barrier_for"
    with pytest.raises(ValueError, match=message):
        trace(["x", "y"])
    trace(["x", "y"], partial=True)
