"""Copies that a barrier awaits are counted where a kernel is traced."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import scratch

X = jax.ShapeDtypeStruct((128,), jnp.float32)


def trace(body, **barriers):
    """Traces a kernel that loads its operand x to the SMEM `tiles`."""

    def call(x):
        tiles = [plgpu.SMEM(X.shape, X.dtype) for _ in range(2)]
        scratch.kernel(
            body, inputs=dict(x=x), outputs=dict(o=X), scratch=dict(tiles=tiles, **barriers)
        )

    jax.make_jaxpr(call)(X)


def copies(refs, *numbers):
    return ((refs.x, tile, *numbers) for tile in refs.tiles)


def test_copies_are_as_many_as_the_barrier_awaits():
    loaded = scratch.barrier_for(dict(x=2))
    trace(lambda refs: scratch.fetch_each(copies(refs), refs.loaded), loaded=loaded)
    trace(lambda refs: scratch.fetch(dict(x=list(copies(refs))), refs.loaded), loaded=loaded)


@pytest.mark.parametrize("awaited", [1, 3])
def test_any_other_number_is_an_error(awaited):
    loaded = scratch.barrier_for(dict(x=awaited))
    with pytest.raises(ValueError, match=r"are .2., and the barriers await"):
        trace(lambda refs: scratch.fetch_each(copies(refs), refs.loaded), loaded=loaded)
    with pytest.raises(ValueError, match="has 2 copies"):
        trace(lambda refs: scratch.fetch(dict(x=list(copies(refs))), refs.loaded), loaded=loaded)
    trace(lambda refs: scratch.fetch_each(copies(refs), refs.loaded, partial=True), loaded=loaded)


def test_several_barriers_are_counted_each():
    def body(refs):
        scratch.fetch_each(copies(refs, 1), refs.first, refs.second)

    two = scratch.barrier_for(dict(x=2))
    with pytest.raises(ValueError, match=r"are .0, 2., and the barriers await .2, 2."):
        trace(body, first=two, second=two)
    with pytest.raises(ValueError, match=r"await .1, 2."):
        trace(body, first=scratch.barrier_for(["x"]), second=two)
