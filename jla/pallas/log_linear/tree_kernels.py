"""The two kernels that walk through log-linear attention's tree: up for the states of the nodes
that are read, down for the gradients of the leaf blocks' states.

A CTA walks alone through one head's whole tree with 1024 elements of each state, which come in a
ring of SMEM. A stack in SMEM has, for each height, the total of the latest left node.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.mosaic import bf16, f32
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.log_linear import tree

SDS = jax.ShapeDtypeStruct
STAGES = 4
ROWS, WIDTH = 4, 256  # how a CTA sees its part of a state: a row a warp
LAYOUT = mosaic.rows_by_warp()


def tree_states(leaves, decays, *, root=False):
    """The states that are read, from those of the leaf blocks.

    With p the parent of nodes l and r and D the decay over r, S_p = D S_l + S_r. Left nodes are
    read, whether or not they have a right sibling.

    Args:
      leaves: [B, H, n, V, K] float32. decays: over each left node's right sibling, [B, H, n]
        float32, in the order of the results; what has no sibling is not used.
      root: whether the state of all leaf blocks is wanted; n is then a power of two.

    Returns:
      [B, H, n, V, K] bf16, by height and then from left to right; and the root's as it was summed,
      [B, H, V, K] float32, or None.

    A CTA takes the leaf blocks from left to right, as a binary counter counts: a block's state
    takes up its left sibling's, the sum that of its own left sibling, until it is a left node's
    state. That is written, and kept in float32 for its sibling: no sum is rounded on the way.

    Floor at B=16 T=4096 H=8 K=V=128, leaf blocks of 256, n = 15: 0.189 GB, each byte once, 0.044 ms
    at 4.3 TB/s. 29 KB of SMEM (a stack of 4 KB for each height but one), 62 registers.
    """
    B, H, n, V, K = leaves.shape
    slices = V * K // (ROWS * WIDTH)
    highest = n.bit_length() - 1  # no node of this height has a right sibling
    out = scratch.kernel(
        functools.partial(_up, H=H, highest=highest),
        inputs=dict(
            leaves=leaves.reshape(B * H, n, slices * ROWS, WIDTH), decays=decays.reshape(B * H, n)
        ),
        outputs=dict(
            states=SDS((B * H, n, slices * ROWS, WIDTH), bf16),
            root=SDS((B * H, slices * ROWS, WIDTH), f32) if root else None,
        ),
        scratch=dict(
            totals=plgpu.SMEM((max(1, highest), ROWS, WIDTH), f32),
            ring=plgpu.SMEM((STAGES, ROWS, WIDTH), f32),
            loaded=barrier_for(["leaf"], STAGES),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, H, slices),
        grid_names=("b", "h", "part"),
    )
    return out.states.reshape(leaves.shape), out.root.reshape(B, H, V, K) if root else None


def _up(refs, *, H, highest):
    """The body of `tree_states`."""
    n = refs.leaves.shape[1]
    head, part = lax.axis_index("b") * H + lax.axis_index("h"), lax.axis_index("part")
    rows = pl.ds(part * ROWS, ROWS)

    def load(i):
        slot = _slot(i)
        leaf = refs.leaves.at[head, i, rows], refs.ring.at[slot]
        fetch(dict(leaf=leaf), refs.loaded.at[slot])

    def step(i, _):
        def decay(height):
            """That of the pair of siblings of this height that block i is part of."""
            return refs.decays[head, tree.place(n, i, height)]

        def add_left(height, carry):
            total, own = carry
            following = decay(height + 1)  # the last one's is not used
            return own * _load(refs.totals.at[height]) + total, following

        slot = _slot(i)
        first = decay(0)  # early, as the others: it may come from L2
        plgpu.barrier_wait(refs.loaded.at[slot])
        leaf = _load(refs.ring.at[slot])
        plgpu.commit_smem()  # all warps are done with this slot
        pl.when(i + STAGES < n)(lambda: load(i + STAGES))
        height = _lowest_bit(i + 1)
        total, _ = lax.fori_loop(0, height, add_left, (leaf, first))
        state = refs.states.at[head, tree.place(n, i, height), rows]
        mosaic.store(state, total.astype(bf16))
        if refs.root is not None:
            pl.when(i == n - 1)(lambda: mosaic.store(refs.root.at[head, rows], total))

        @pl.when(height < highest)
        def _():
            # No other thread reads or writes this thread's elements.
            mosaic.store(refs.totals.at[height], total)

    for i in range(min(n, STAGES)):
        load(jnp.int32(i))
    lax.fori_loop(0, n, step, None)


def tree_gradients(sums, states, decays, per, root=None):
    """The gradients of the leaf blocks' states and of the decays between them.

    With G of a node's own readers, which only left nodes have, p the parent of nodes l and r, D the
    decay over r, S_l the state of l,

        total_l = G_l + D total_p;  total_r = total_p;  dD = <total_p, S_l>

    and a node with no parent has total = G.

    Args:
      sums: the jobs' sums of `tree.reader_jobs`, [B, H, J, V, K] float32: each G in parts. More
        behind them are not read. None: there are no such jobs.
      root: the root's G, [B, H, V, K] float32, where all n leaf blocks have one; None: they do not.
      states: as `tree_states` returned them, [B, H, n, V, K] bf16. decays: [B, H, n], as it took
        them.
      per: chunks of a leaf block.

    Returns:
      of the leaf blocks' states, [B, H, n, V, K] bf16; of the decays, [B, H, n] float32.

    A CTA takes the left nodes from left to right, those that start at one leaf block from the
    highest down, so that a node comes after all above it. A right node's total is its parent's:
    nothing is computed or kept for it, and a node takes what is above it from its lowest ancestor
    that is a left node. Nothing but the sums for the decays' gradients goes across elements.

    All arithmetic is float32, and is rounded once. Each warp writes its share of a decay's
    gradient, and XLA adds them up: no atomics, the same bits every time.

    Floor at B=16 T=4096 H=8 K=V=128, leaf blocks of 256, n = 15: 0.235 GB, each byte once, 0.055 ms
    at 4.3 TB/s. 37 KB of SMEM (a stack of 4 KB for each height but one), 44 registers.
    """
    B, H, n, V, K = states.shape
    heights = tree.heights(per, n + 1)
    if root is not None:
        heights[-1] = 1, 1  # the root, and not in parts
    slices = V * K // (ROWS * WIDTH)
    out = scratch.kernel(
        functools.partial(_down, H=H, heights=heights),
        inputs=dict(
            sums=None if sums is None else sums.reshape(B * H, -1, slices * ROWS, WIDTH),
            root=None if root is None else root.reshape(B * H, slices * ROWS, WIDTH),
            states=states.reshape(B * H, n, slices * ROWS, WIDTH),
            decays=decays.reshape(B * H, n),
        ),
        outputs=dict(
            leaves=SDS((B * H, n, slices * ROWS, WIDTH), bf16),
            ddecays=SDS((B * H, n, slices * ROWS), f32),
        ),
        scratch=dict(
            totals=plgpu.SMEM((max(1, len(heights) - 1), ROWS, WIDTH), f32),
            own=plgpu.SMEM((STAGES, ROWS, WIDTH), f32),
            state=plgpu.SMEM((STAGES, ROWS, WIDTH), bf16),
            own_loaded=barrier_for(["own"], STAGES),
            state_loaded=barrier_for(["state"], STAGES),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, H, slices),
        grid_names=("b", "h", "part"),
    )
    return out.leaves.reshape(states.shape), out.ddecays.sum(axis=2).reshape(B, H, n)


def _down(refs, *, H, heights):
    """The body of `tree_gradients`."""
    jobs, n = sum(nodes * parts for nodes, parts in heights), refs.states.shape[1]
    head, part = lax.axis_index("b") * H + lax.axis_index("h"), lax.axis_index("part")
    rows = pl.ds(part * ROWS, ROWS)

    def load(i, job):
        start, height, _ = job
        slot = _slot(i)

        def own(source):
            fetch(dict(own=(source, refs.own.at[slot])), refs.own_loaded.at[slot])

        def own_of_node():
            own(refs.sums.at[head, _place_of_job(heights, job), rows])

        if refs.root is None:
            own_of_node()
        else:
            pl.when(i == 0)(lambda: own(refs.root.at[head, rows]))
        if refs.root is not None and refs.sums is not None:
            pl.when(i > 0)(own_of_node)

        @pl.when(_is_last(heights, job) & _has_parent(n, start, height))
        def _():
            source = refs.states.at[head, tree.place(n, start, height), rows]
            fetch(dict(state=(source, refs.state.at[slot])), refs.state_loaded.at[slot])

    def step(i, carry):
        ahead, job, gradient = carry
        following = i + STAGES - 1
        pl.when(following < jobs)(lambda: load(following, ahead))
        start, height, piece = job
        slot = _slot(i)
        decay = refs.decays[head, tree.place(n, start, height)]  # early: it may come from L2
        plgpu.barrier_wait(refs.own_loaded.at[slot])
        x = _load(refs.own.at[slot])
        gradient = jnp.where(jnp.broadcast_to(piece > 0, x.shape), gradient + x, x)
        node = functools.partial(_on_node, refs, (head, rows), job, slot, decay, gradient)
        pl.when(_is_last(heights, job))(node)
        plgpu.commit_smem()  # all warps are done with this slot
        return _next(n, heights, *ahead), _next(n, heights, *job), gradient

    first = jnp.int32(0), jnp.int32(n.bit_length() - 1), jnp.int32(0)
    ahead = first
    for i in range(STAGES - 1):
        if i < jobs:
            load(jnp.int32(i), ahead)
        ahead = _next(n, heights, *ahead)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, WIDTH), f32), LAYOUT)
    lax.fori_loop(0, jobs, step, (ahead, first, zeros))


def _on_node(refs, part, job, slot, decay, gradient):
    """total_l, and its share of dD; total_r where the right node is a leaf block."""
    head, rows = part
    start, height, _ = job
    n = refs.states.shape[1]
    place = tree.place(n, start, height)
    shares = refs.ddecays.at[head, place, rows]

    def below_parent():
        total = _load(refs.totals.at[_nearest_left(start, height) - 1])
        plgpu.barrier_wait(refs.state_loaded.at[slot])
        mosaic.store(shares, (total * _load(refs.state.at[slot])).sum(axis=1))

        @pl.when(height == 0)
        def _():
            mosaic.store(refs.leaves.at[head, start + 1, rows], total.astype(bf16))

        return gradient + decay * total

    def alone():
        mosaic.store(shares, plgpu.layout_cast(jnp.zeros((ROWS,), f32), LAYOUT.reduce(1)))
        return gradient

    total = lax.cond(_has_parent(n, start, height), below_parent, alone)

    @pl.when(height == 0)
    def _():
        mosaic.store(refs.leaves.at[head, start, rows], total.astype(bf16))

    @pl.when(height > 0)
    def _():
        # No other thread reads or writes this thread's elements.
        mosaic.store(refs.totals.at[height - 1], total)


def _load(ref):
    return mosaic.load(ref, LAYOUT, optimized=False)


def _slot(i):
    return lax.rem(i, jnp.int32(STAGES))


def _next(n, heights, start, height, piece):
    """The job after this one: a node's parts, then the left nodes below, then those to the right.

    A left node is known by its first leaf block and its height, a job by its part, too.
    """
    more = jnp.logical_not(_is_last(heights, (start, height, piece)))
    down, right = height > 0, start + 2
    highest = jnp.minimum(_lowest_bit(right), _highest_bit(jnp.maximum(n - right, 1)) + 1) - 1
    return (
        jnp.where(more, start, jnp.where(down, start, right)),
        jnp.where(more, height, jnp.where(down, height - 1, highest)),
        jnp.where(more, piece + 1, 0),
    )


def _is_last(heights, job):
    """Whether no part of the job's node is still to come."""
    _, height, piece = job
    parts = jnp.int32(1)
    for m, (_, count) in enumerate(heights):
        if count > 1:
            parts = jnp.where(height == m, count, parts)
    return piece == parts - 1


def _place_of_job(heights, job):
    """Which of the jobs of `tree.reader_jobs` it is."""
    start, height, piece = job
    n = sum(nodes for nodes, _ in heights)
    place, at = tree.place(n, start, height), 0
    for m, (nodes, parts) in enumerate(heights):
        if parts > 1:
            there = at + lax.shift_right_logical(start, m + 1) * parts + piece
            place = jnp.where(height == m, there, place)
        at += nodes * parts
    return place


def _has_parent(n, start, height):
    return start + lax.shift_left(jnp.int32(2), height) <= n


def _nearest_left(start, height):
    """The height of the lowest left node above: the parent has its total."""
    return _lowest_bit(lax.bitwise_not(start) & -lax.shift_left(jnp.int32(2), height))


def _highest_bit(x):
    return 31 - lax.clz(x)


def _lowest_bit(x):
    return _highest_bit(lax.bitwise_and(x, -x))
