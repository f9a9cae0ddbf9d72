"""A kernel's operands, results and scratch by name, and loads that count themselves.

    def body(refs):
        fetch(dict(q=(refs.q.at[b, rows, h], refs.queries), v=...), refs.loaded)
        plgpu.barrier_wait(refs.loaded)
        ...

    out = kernel(
        body,
        inputs=dict(q=q, v=v, g=g),  # g may be None, and then is in refs, too
        outputs=dict(o=SDS(v.shape, bf16)),
        scratch=dict(queries=tile(64, K), values=tile(64, V), loaded=barrier_for(["q", "v"])),
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    out.o

Nothing is passed by position, so that an array can be added in one place; and a copy that its
barrier does not await is an error where the kernel is traced, and no race on the GPU.
"""

import collections
import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic


def kernel(body, *, inputs, outputs, scratch, in_place=None, **options):
    """Runs `mosaic.kernel` on the inputs, with a body that takes all refs by name.

    Args:
      body: body(refs), where the named tuple `refs` has a ref for each input, output and scratch.
      inputs: {name: array}. outputs: {name: jax.ShapeDtypeStruct}. A value may be a tuple or list
        of them, and `refs` then has one of refs; or None: it is left out, and None in `refs`.
      scratch: {name: type}, likewise, and allocated in this order. A dict {name: type, ...} as a
        type is one piece of SMEM that holds one of them at a time; `refs` has a named tuple of all.
      in_place: {input: output}, by name, of those that may lie in the same memory; of lists, the
        arrays of the one and of the other, in order.
      options: as `mosaic.kernel` takes them: grid, threads, automatic_barriers, ...

    Returns:
      A named tuple of the outputs.
    """
    Refs, Results = _record("Refs", *inputs, *outputs, *scratch), _record("Results", *outputs)
    operands, input_tree = jax.tree.flatten(list(inputs.values()))
    out_types, output_tree = jax.tree.flatten(list(outputs.values()))
    first_output, first_scratch = len(operands), len(operands) + len(out_types)

    def named(*refs):
        rest = iter(refs[first_scratch:])
        body(
            Refs(
                *jax.tree.unflatten(input_tree, refs[:first_output]),
                *jax.tree.unflatten(output_tree, refs[first_output:first_scratch]),
                *(None if x is None else _named(x, next(rest)) for x in scratch.values()),
            )
        )

    # The kernel's name in a profile: "kda_step" and so on.
    named.__name__ = "_".join(functools.partial(body).func.__module__.split(".")[-2:])
    if in_place is not None:
        in_place = {
            _number(inputs, x) + i: _number(outputs, y) + i
            for x, y in in_place.items()
            for i in range(len(jax.tree.leaves(inputs[x])))
        }
    results = mosaic.kernel(
        named,
        out_type=out_types,
        scratch_types=[_united(x) for x in scratch.values() if x is not None],
        in_place=in_place,
        **options,
    )(*operands)
    return Results(*jax.tree.unflatten(output_tree, results))


# The same class for the same names: a loop's body has to return what it is given.
@functools.cache
def _record(kind, *names):
    return collections.namedtuple(kind, names)


def _united(scratch_type):
    """The type, or the union of a dict's."""
    is_union = isinstance(scratch_type, dict)
    return plgpu.RefUnion(*scratch_type.values()) if is_union else scratch_type


def _named(scratch_type, ref):
    """The ref, or those of a union by name."""
    is_union = isinstance(scratch_type, dict)
    return _record("Union", *scratch_type)(*ref) if is_union else ref


def _number(named, name):
    """The number of a name's array among all that there are."""
    before = list(named)[: list(named).index(name)]
    return len(jax.tree.leaves([named[x] for x in before]))


def barrier_for(loads, stages=()):
    """The barrier that awaits some loads, or `stages` of them: one for each slot of a ring.

    Args:
      loads: the names of what is loaded, in one copy each; or {name: number of copies}. None as a
        number is 0.
    """
    if isinstance(loads, dict):
        loads = [name for name, copies in loads.items() for _ in range(copies or 0)]
    return plgpu.Barrier(num_arrivals=len(loads), num_barriers=stages)


def fetch(loads, barrier, *, partial=False):
    """Starts copies from GMEM to SMEM, each of which arrives at the barrier.

    Args:
      loads: {name: (source, target)}, or {name: [(source, target), ...]} for several copies, or
        {name: None} for none. In the order of the entries.
      barrier: of `barrier_for`; or one of several, `barrier.at[slot]`.
      partial: whether other calls, or other warpgroups, start the rest of what the barrier awaits.
        If not, all of it must be here.
    """
    several = {name: [x] if isinstance(x, tuple) else x for name, x in loads.items() if x}
    copies, awaited = sum(map(len, several.values())), barrier.dtype.num_arrivals
    if not partial and copies != awaited:
        raise ValueError(
            f"fetch: `loads` has {copies} copies ({', '.join(several)}) and `barrier` awaits "
            f"{awaited}; declare it as barrier_for(...) of the same loads, or pass partial=True if "
            "others start the rest"
        )
    for pairs in several.values():
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, barrier)


# Added for the kernels beside PaTH's.


def fetch_each(copies, *barriers, partial=False):
    """As `fetch` of all that the barriers await, from a generator of (source, target).

    Each copy is started before the next pair is made, and so is the arithmetic of its indices. With
    several barriers a third entry is the number of the copy's. `partial` as in `fetch`.
    """
    started = [0] * len(barriers)
    for source, target, *number in copies:
        (number,) = number or (0,)
        plgpu.copy_gmem_to_smem(source, target, barriers[number])
        started[number] += 1
    awaited = [barrier.dtype.num_arrivals for barrier in barriers]
    if not partial and started != awaited:
        raise ValueError(
            f"fetch_each: the numbers of `copies` are {started}, and the barriers await {awaited}; "
            "declare them as barrier_for(...) of the same copies"
        )
