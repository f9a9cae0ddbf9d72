"""The checks that the tests add to Mosaic's interpreter: what they refuse, what they let pass."""

import contextlib

import hardware
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import jla.pallas
from jla.pallas.common import mosaic

f32, bf16 = jnp.float32, jnp.bfloat16


@contextlib.contextmanager
def refusal(message):
    """`message` is what the interpreter says inside, None for nothing."""
    if message is None:
        yield
    else:
        with pytest.raises(Exception, match=message):
            yield
        hardware.gpu_callbacks.reset_gpu_interpret_mode_state()


def run_on_a_square(body, message, *, tiles=1, **options):
    square = jax.ShapeDtypeStruct((64, 64), f32)
    scratch = [mosaic.tile(64, 64)] * tiles
    run = mosaic.kernel(body, out_type=square, scratch_types=scratch, **options)
    with jla.pallas.interpret(), refusal(message):
        jax.block_until_ready(run(jnp.eye(64, dtype=bf16)))


@pytest.mark.parametrize("commits", [True, False])
def test_a_products_operand_is_committed(commits):
    def body(x_ref, y_ref, tile):
        tile[...] = x_ref[...]
        if commits:
            plgpu.commit_smem()
        y_ref[...] = mosaic.product((tile, tile.T))

    run_on_a_square(body, None if commits else "no `commit_smem` before")


@pytest.mark.parametrize(
    "automatic, commits, message",
    [(True, False, None), (False, True, None), (False, False, "one warp may still read")],
)
def test_warps_meet_before_a_store_over_a_products_operand(automatic, commits, message):
    """The interpreter knows no warps: it calls no such store a race."""

    def body(x_ref, y_ref, tile):
        tile[...] = x_ref[...]
        plgpu.commit_smem()
        y_ref[...] = mosaic.product((mosaic.load(x_ref).astype(bf16), tile))
        if commits:
            plgpu.commit_smem()
        tile[...] = x_ref[...]

    run_on_a_square(body, message, automatic_barriers=automatic)


@pytest.mark.parametrize(
    "write, read, commits, message",
    [
        # A left operand's rows are read by the warp that stores them.
        (False, "left", False, None),
        (False, "transposed", False, "one warp may still read"),
        (True, "straight", False, None),
        (True, "transposed", True, None),
        (True, "transposed", False, "one warp may still store"),
    ],
)
def test_warps_meet_before_they_touch_anothers_rows(write, read, commits, message):
    def body(x_ref, y_ref, tile, other):
        tile[...] = x_ref[...]
        other[...] = x_ref[...]
        if commits or not write:
            plgpu.commit_smem()
        if read == "left":
            y_ref[...] = mosaic.product((tile, other))
        else:
            y_ref[...] = mosaic.load(tile.T if read == "transposed" else tile)
        if not write:
            tile[...] = x_ref[...]

    run_on_a_square(body, message, tiles=2, automatic_barriers=False)


@pytest.mark.parametrize(
    "shape, tile, index, message",
    [
        # The last rows of a batch row, which the next follows; of the last; with heads between.
        ((2, 12, 1, 128), (8, 128), lambda i: (0, i, 0), "behind its row"),
        ((2, 12, 1, 128), (8, 128), lambda i: (1, i, 0), None),
        ((2, 12, 3, 128), (8, 128), lambda i: (0, i, 0), None),
        # Two heads of 64 are one piece of 128.
        ((1, 16, 2, 64), (8, 128), lambda i: (0, i, 1), "behind its row"),
    ],
)
def test_a_store_stays_in_its_row(shape, tile, index, message):
    def body(y_ref, tile_ref):
        tile_ref[...] = jnp.ones(tile, f32)
        plgpu.commit_smem()
        start = jax.lax.axis_index("i") * 8 + 8  # not known when it is traced
        b, rows, h = index(pl.ds(start, 8))
        width = pl.ds((start - 8) * 0, 128)
        plgpu.copy_smem_to_gmem(tile_ref, y_ref.at[b, rows, h, width])
        plgpu.wait_smem_to_gmem(0)

    run = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, f32),
        scratch_types=[plgpu.SMEM(tile, f32)],
        grid=(1,),
        grid_names=("i",),
    )
    with jla.pallas.interpret(), refusal(message):
        jax.block_until_ready(run())
