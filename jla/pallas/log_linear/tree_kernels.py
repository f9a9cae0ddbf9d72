"""The two kernels that walk through log-linear attention's tree: up for the states of the nodes
that are read, down for the gradients of the leaf blocks' states.

A CTA walks alone through one head's whole tree with 1024 elements of each state, which come in a
ring of SMEM. A stack in SMEM has, for each height, the total of the latest left node.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import bf16, f32
from jla.pallas.log_linear import tree

SDS = jax.ShapeDtypeStruct
STAGES = 4
ROWS, WIDTH = 4, 256  # how a CTA sees its part of a state: a row a warp
LAYOUT = mosaic.rows_by_warp()


def tree_states(leaves, decays):
    """The states that are read, from those of the leaf blocks.

    With p the parent of nodes l and r and D the decay over r, S_p = D S_l + S_r. Left nodes are
    read, whether or not they have a right sibling.

    Args:
      leaves: [B, H, n, V, K] float32. decays: over each left node's right sibling, [B, H, n]
        float32, in the order of the results; what has no sibling is not used.

    Returns:
      [B, H, n, V, K] bf16, by height and then from left to right.

    A CTA takes the leaf blocks from left to right, as a binary counter counts: a block's state
    takes up its left sibling's, the sum that of its own left sibling, until it is a left node's
    state. That is written, and kept in float32 for its sibling: no sum is rounded on the way.

    Each byte is read or written once. B=16 T=4096 H=8 K=V=128, leaf blocks of 256, n = 15: leaves
    126 MB, states 63 MB: 0.189 GB, 0.044 ms at 4.3 TB/s; 0.053 predicted, 85% of that speed. Some
    115 instructions a warp and step, of which there are 233 a multiprocessor, take 0.025 ms at two
    and a half a clock. A thread has 8 elements and 62 registers (85 at n = 511, where ptxas unrolls
    more), no spills. Seven CTAs share a multiprocessor (29 KB of SMEM: a ring of four 16 KB, the
    stack 4 KB for each height but one), with 84 KB and more on their way, where a latency of a
    microsecond needs 33.

    At T=131072 B=1 H=16 (n = 511, a stack of 32 KB) 256 CTAs run at once, two a multiprocessor
    with 32 KB on their way at most: 0.80 GB, 0.187 ms, and under it 511 steps of some 550 clocks,
    0.16 ms; 0.24 predicted.
    """
    B, H, n, V, K = leaves.shape
    slices = V * K // (ROWS * WIDTH)
    highest = n.bit_length() - 1  # no node of this height has a right sibling

    def body(leaves_ref, decays_ref, states_ref, totals, ring, loaded):
        head, part = lax.axis_index("b") * H + lax.axis_index("h"), lax.axis_index("part")
        rows = pl.ds(part * ROWS, ROWS)

        def fetch(i):
            slot = _slot(i)
            source = leaves_ref.at[head, i, rows]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], loaded.at[slot])

        def step(i, _):
            def decay(height):
                """That of the pair of siblings of this height that block i is part of."""
                return decays_ref[head, tree.place(n, i, height)]

            def add_left(height, carry):
                total, own = carry
                following = decay(height + 1)  # the last one's is not used
                return own * _load(totals.at[height]) + total, following

            slot = _slot(i)
            first = decay(0)  # early, as the others: it may come from L2
            plgpu.barrier_wait(loaded.at[slot])
            leaf = _load(ring.at[slot])
            plgpu.commit_smem()  # all warps are done with this slot
            pl.when(i + STAGES < n)(lambda: fetch(i + STAGES))
            height = _lowest_bit(i + 1)
            total, _ = lax.fori_loop(0, height, add_left, (leaf, first))
            mosaic.store(states_ref.at[head, tree.place(n, i, height), rows], total.astype(bf16))

            @pl.when(height < highest)
            def _():
                # No other thread reads or writes this thread's elements.
                mosaic.store(totals.at[height], total)

        for i in range(min(n, STAGES)):
            fetch(jnp.int32(i))
        lax.fori_loop(0, n, step, None)

    states = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=SDS((B * H, n, slices * ROWS, WIDTH), bf16),
        scratch_types=[
            plgpu.SMEM((max(1, highest), ROWS, WIDTH), f32),
            plgpu.SMEM((STAGES, ROWS, WIDTH), f32),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        ],
        grid=(B, H, slices),
        grid_names=("b", "h", "part"),
    )(leaves.reshape(B * H, n, slices * ROWS, WIDTH), decays.reshape(B * H, n))
    return states.reshape(leaves.shape)


def tree_gradients(sums, states, decays, per):
    """The gradients of the leaf blocks' states and of the decays between them.

    With G of a node's own readers, which only left nodes have, p the parent of nodes l and r, D the
    decay over r, S_l the state of l,

        total_l = G_l + D total_p;  total_r = total_p;  dD = <total_p, S_l>

    and a node with no parent has total = G.

    Args:
      sums: the jobs' sums of `tree.reader_jobs`, [B, H, J, V, K] float32: each G in parts.
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

    Each byte is read or written once. B=16 T=4096 H=8 K=V=128, leaf blocks of 256, n = 15: the sums
    126 MB, the states of the 11 nodes that have a parent 46 MB, the results 63 MB: 0.235 GB, 0.055
    ms at 4.3 TB/s; 0.07 predicted, of which XLA's sums of 0.5 MB take 0.003. Nothing else should
    matter, though the instructions are not far: 2048 CTAs of 15 steps are 233 steps a
    multiprocessor, and some 200 instructions a warp and step take 0.04 ms at two and a half a
    clock. A thread has 8 elements and 44 registers, no spills. A step's latency, some 500 clocks,
    is hidden by six CTAs a multiprocessor (37 KB of SMEM: a ring of four 24 KB, the stack 4 KB for
    each height but one). They have three tiles each on their way, 80 KB and more, where a latency
    of a microsecond needs 33.

    At T=131072 B=1 H=16 (n = 511, a stack of 32 KB, 640 jobs, for high nodes come in parts) 256
    CTAs run at once: 1.2 GB, 0.28 ms, and under it 640 steps of 500 clocks, 0.18 ms.
    """
    B, H, n, V, K = states.shape
    heights = tree.heights(per, n + 1)
    jobs = sum(nodes * parts for nodes, parts in heights)
    slices = V * K // (ROWS * WIDTH)

    def body(
        sums_ref, states_ref, decays_ref, leaves_ref, ddecays_ref, totals, own, state, *loaded
    ):
        own_loaded, state_loaded = loaded
        head, part = lax.axis_index("b") * H + lax.axis_index("h"), lax.axis_index("part")
        rows = pl.ds(part * ROWS, ROWS)

        def fetch(i, job):
            start, height, _ = job
            slot = _slot(i)
            source = sums_ref.at[head, _place_of_job(heights, job), rows]
            plgpu.copy_gmem_to_smem(source, own.at[slot], own_loaded.at[slot])

            @pl.when(_is_last(heights, job) & _has_parent(n, start, height))
            def _():
                source = states_ref.at[head, tree.place(n, start, height), rows]
                plgpu.copy_gmem_to_smem(source, state.at[slot], state_loaded.at[slot])

        def on_node(start, height, slot, decay, gradient):
            place = tree.place(n, start, height)
            shares = ddecays_ref.at[head, place, rows]

            def below_parent():
                total = _load(totals.at[_nearest_left(start, height) - 1])
                plgpu.barrier_wait(state_loaded.at[slot])
                mosaic.store(shares, (total * _load(state.at[slot])).sum(axis=1))

                @pl.when(height == 0)
                def _():
                    mosaic.store(leaves_ref.at[head, start + 1, rows], total.astype(bf16))

                return gradient + decay * total

            def alone():
                mosaic.store(shares, plgpu.layout_cast(jnp.zeros((ROWS,), f32), LAYOUT.reduce(1)))
                return gradient

            total = lax.cond(_has_parent(n, start, height), below_parent, alone)

            @pl.when(height == 0)
            def _():
                mosaic.store(leaves_ref.at[head, start, rows], total.astype(bf16))

            @pl.when(height > 0)
            def _():
                # No other thread reads or writes this thread's elements.
                mosaic.store(totals.at[height - 1], total)

        def step(i, carry):
            ahead, job, gradient = carry
            following = i + STAGES - 1
            pl.when(following < jobs)(lambda: fetch(following, ahead))
            start, height, piece = job
            slot = _slot(i)
            decay = decays_ref[head, tree.place(n, start, height)]  # early: it may come from L2
            plgpu.barrier_wait(own_loaded.at[slot])
            x = _load(own.at[slot])
            gradient = jnp.where(jnp.broadcast_to(piece > 0, x.shape), gradient + x, x)
            pl.when(_is_last(heights, job))(lambda: on_node(start, height, slot, decay, gradient))
            plgpu.commit_smem()  # all warps are done with this slot
            return _next(n, heights, *ahead), _next(n, heights, *job), gradient

        first = jnp.int32(0), jnp.int32(n.bit_length() - 1), jnp.int32(0)
        ahead = first
        for i in range(STAGES - 1):
            if i < jobs:
                fetch(jnp.int32(i), ahead)
            ahead = _next(n, heights, *ahead)
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, WIDTH), f32), LAYOUT)
        lax.fori_loop(0, jobs, step, (ahead, first, zeros))

    of_leaves, of_decays = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=[
            SDS((B * H, n, slices * ROWS, WIDTH), bf16),
            SDS((B * H, n, slices * ROWS), f32),
        ],
        scratch_types=[
            plgpu.SMEM((max(1, len(heights) - 1), ROWS, WIDTH), f32),
            plgpu.SMEM((STAGES, ROWS, WIDTH), f32),
            plgpu.SMEM((STAGES, ROWS, WIDTH), bf16),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        ],
        grid=(B, H, slices),
        grid_names=("b", "h", "part"),
    )(
        sums.reshape(B * H, jobs, slices * ROWS, WIDTH),
        states.reshape(B * H, n, slices * ROWS, WIDTH),
        decays.reshape(B * H, n),
    )
    return of_leaves.reshape(states.shape), of_decays.sum(axis=2).reshape(B, H, n)


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
