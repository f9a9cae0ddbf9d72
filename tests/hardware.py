"""What Mosaic's interpreter lets pass and a GPU does not: checks that are added to it.

They stand here and not in `jla.pallas.interpret`, for they reach into JAX's own modules.
"""

import dataclasses
import functools
import math

import jax
from jax._src import source_info_util
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import HostAllocationKey

from jla.pallas.common.mosaic import OPERAND, RIGHT


def check_more():
    """Adds the checks to every kernel that is interpreted from now on."""
    calls = gpu_callbacks
    calls._get = _before(_before(calls._get, _operand_is_committed), _warps_have_met_to_load)
    calls._swap = _before(calls._swap, _warps_have_met_to_store)
    calls.commit_smem = _before(calls.commit_smem, _warps_meet)
    calls.wait_smem_to_gmem = _before(calls.wait_smem_to_gmem, _warps_meet)
    calls.copy_smem_to_gmem = _before(calls.copy_smem_to_gmem, _stays_in_its_row)
    calls._initialize_shared_memory = _with_accesses(calls._initialize_shared_memory)
    whole = interpret_pallas_call.interpret_pallas_call
    interpret_pallas_call.interpret_pallas_call = _told_of_barriers(whole)


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


@dataclasses.dataclass(frozen=True)
class _Params(InterpretGPUParams):
    automatic_barriers: bool = True


def _told_of_barriers(interpret):
    """The interpreter of one kernel, told whether Mosaic puts barriers around its stores."""

    @functools.wraps(interpret)
    def run(*args, interpret_params, compiler_params, **parameters):
        automatic = not getattr(compiler_params, "unsafe_no_auto_barriers", False)
        told = _Params(**vars(interpret_params), automatic_barriers=automatic)
        return interpret(
            *args, interpret_params=told, compiler_params=compiler_params, **parameters
        )

    return run


def _with_accesses(initialize):
    """The memory of a kernel without such barriers, with what each warpgroup's warps have done
    to it since they met: {thread: [(key, place, transposition, by all, stored, frame)]}."""

    @functools.wraps(initialize)
    def run(*, interpret_params, **arguments):
        token = initialize(interpret_params=interpret_params, **arguments)
        by_hand = interpret_params.detect_races and not interpret_params.automatic_barriers
        gpu_callbacks._get_shared_memory().accesses = {} if by_hand else None
        return token

    return run


def _warps_meet(*, thread, **others):
    """`commit_smem` and `wait_smem_to_gmem` are barriers of the warpgroup."""
    accesses = gpu_callbacks._get_shared_memory().accesses
    if accesses is not None:
        accesses[thread] = []


def _warps_have_met_to_load(
    token, mesh_location, thread, allocation_key_as_array, transforms, *args, source_info, **others
):  # fmt: skip
    _warps_have_met(thread, allocation_key_as_array, transforms, source_info, stores=False)


def _warps_have_met_to_store(
    token, mesh_location, thread, allocation_key_as_array, transforms, *args, source_info, **others
):  # fmt: skip
    _warps_have_met(thread, allocation_key_as_array, transforms, source_info, stores=True)


def _warps_have_met(thread, key, transforms, source_info, *, stores):
    """Without Mosaic's barriers no warp may store what another still reads, nor read what another
    has just stored. For the interpreter a warpgroup is one thread.

    A product reads all of its right operand in each warp. Else each warp has rows of its own, which
    are others only where a tile is stored as it is and read transposed.
    """
    memory = gpu_callbacks._get_shared_memory()
    if thread is None or memory.accesses is None:
        return
    key = HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    access = memory.access(key, transforms)
    whole = source_info is not None and RIGHT in str(source_info.name_stack)
    frame = "" if source_info is None else source_info_util.summarize(source_info)
    before = memory.accesses.setdefault(thread, [])
    for other, place, permutation, by_all, stored, where in before:
        if other != key or not (stores or stored):
            continue
        across = by_all or whole or permutation != access.permutation
        if across and race_detection_state._ranges_overlap(access.range, place):
            raise RuntimeError(
                f"one warp may still {'store' if stored else 'read'} ({where}) what another "
                f"{'stores' if stores else 'reads'} ({frame}): no `commit_smem` between"
            )
    before.append((key, access.range, access.permutation, whole, stores, frame))


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
