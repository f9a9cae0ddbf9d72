"""What Mosaic's interpreter lets pass and a GPU does not: checks that are added to it.

They stand here and not in `jla.pallas.interpret`, for they reach into JAX's own modules.
"""

import functools
import math

import jax
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import HostAllocationKey

from jla.pallas.common.mosaic import OPERAND


def check_more():
    """Adds the checks to every kernel that is interpreted from now on."""
    gpu_callbacks._get = _before(gpu_callbacks._get, _operand_is_committed)
    gpu_callbacks.copy_smem_to_gmem = _before(gpu_callbacks.copy_smem_to_gmem, _stays_in_its_row)


def _before(callback, check):
    """The interpreter's callback, and `check` before it."""

    @gpu_callbacks.fail_on_exception
    @functools.wraps(callback)
    def both(*args, **arguments):
        check(*args, **arguments)
        return callback(*args, **arguments)

    return both


def _access(key, transforms):
    key = HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, gpu_callbacks._get_shared_memory().access(key, transforms).range


def _operand_is_committed(
    token, mesh_location, thread, allocation_key_as_array, transforms, *args, source_info, **others
):  # fmt: skip
    """wgmma reads SMEM as TMA does: what threads stored there it sees after a `commit_smem`."""
    memory = gpu_callbacks._get_shared_memory()
    scope = "" if source_info is None else str(source_info.name_stack)
    if OPERAND not in scope or not memory.detect_races:
        return
    key, place = _access(allocation_key_as_array, transforms)
    seen = memory.get_clock(thread).async_smem_clock.clock
    races = gpu_callbacks.get_races()
    with races.lock:
        writes = list(races.writes[key])
    for _, clock, written, frame in writes:
        overlap = race_detection_state._ranges_overlap(place, written)
        if overlap and not (clock.clock <= seen).all():
            raise RuntimeError(
                f"a product's operand was stored ({frame}) with no `commit_smem` before the product"
            )


def _stays_in_its_row(
    *, src_transforms, dst_allocation_key_as_array, dst_transforms, **others
):  # fmt: skip
    """A store of one piece of memory is cut off where the array ends, and not where its row does.

    Unless the tile in SMEM is swizzled: that is never a plain copy. See docs/mosaic_gpu.md.
    """
    if any(type(transform).__name__ == "UnswizzleRef" for transform in src_transforms):
        return
    key, place = _access(dst_allocation_key_as_array, dst_transforms)
    shape = gpu_callbacks._get_shared_memory().buffer_shape_and_dtype(key).shape
    place = [slice(x, x + 1) if isinstance(x, int) else x for x in place]
    sizes = [x.stop - x.start for x in place]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    inner = [math.prod(sizes[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and a != b for n, a, b in zip(sizes, strides, inner, strict=True)):
        return
    start = sum(x.start * stride for x, stride in zip(place, strides, strict=True))
    written = min(math.prod(sizes), max(math.prod(shape) - start, 0))
    inside = math.prod(max(min(x.stop, n) - x.start, 0) for x, n in zip(place, shape, strict=True))
    if written != inside:
        raise RuntimeError(
            f"a store to [{place}] of an array {shape} goes on behind its row: the GPU cuts it off "
            "only at the array's end"
        )
