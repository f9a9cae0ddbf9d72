"""The kernels that bring log-linear attention's states up the tree, and their gradients down."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, normal, run_in, uniform

import jla.pallas
from jla.pallas.log_linear import tree
from jla.pallas.log_linear.tree_kernels import tree_gradients, tree_states

f32, bf16 = jnp.float32, jnp.bfloat16


def leaves_and_decays(B, H, V, K, n):
    return normal((n, 0), B, H, n, V, K), uniform((n, 1), B, H, n)


def definition_of_states(leaves, decays):
    """Height by height, in float64."""
    nodes, decays = (np.asarray(x, np.float64) for x in (leaves, decays))
    states = nodes[:, :, :0]
    while nodes.shape[2]:
        left, right = nodes[:, :, 0::2], nodes[:, :, 1::2]
        pairs = right.shape[2]
        over_right = decays[:, :, states.shape[2] :][:, :, :pairs, None, None]
        states = np.concatenate([states, left], axis=2)
        nodes = over_right * left[:, :, :pairs] + right
    return states


def check_states(context, sizes, n):
    args, root = leaves_and_decays(*sizes, n), n & (n - 1) == 0
    run = jax.jit(functools.partial(tree_states, root=root))
    states, of_all = run_in(context, run, *args)
    # As below: no sum is rounded to bf16 on the way.
    assert states.dtype == bf16
    want = jnp.asarray(definition_of_states(*args), f32)
    close(states, want.astype(bf16), 2e-4)
    if root:
        close(of_all, want[:, :, -1], 2e-6)


@pytest.mark.parametrize(
    "n",
    [
        1,  # one leaf block before the last
        4,  # the last node is the root
        14,  # the last nodes of heights 1 and 2 have no sibling
        pytest.param(15, marks=pytest.mark.slow),
        pytest.param(38, marks=pytest.mark.slow),
    ],
)
def test_states_are_the_definition(n):
    check_states(jla.pallas.interpret, (1, 2, 64, 64), n)


@pytest.mark.slow
@pytest.mark.parametrize("V, K", [(64, 128), (128, 128)])
def test_wide_states_up(V, K):
    check_states(jla.pallas.interpret, (2, 1, V, K), 3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes, n", [((16, 8, 128, 128), 15), ((1, 3, 128, 64), 512), ((2, 3, 64, 64), 390)]
)
def test_states_on_a_gpu(sizes, n):
    check_states(contextlib.nullcontext, sizes, n)


def arguments(B, H, V, K, blocks, per):
    """As much is read of each node, in however many parts."""
    jobs, n = sum(nodes * parts for nodes, parts in tree.heights(per, blocks)), blocks - 1
    sums = normal((blocks, 0), B, H, jobs, V, K)
    states = normal((blocks, 1), B, H, n, V, K).astype(bf16)
    return sums, states, uniform((blocks, 2), B, H, n)


def definition(sums, states, decays, per, root=None):
    """Node by node, in float64."""
    sums, states, decays = (np.asarray(x, np.float64) for x in (sums, states, decays))
    n = states.shape[2]
    job, place, totals, of_decays = sums.shape[2], n, {}, np.zeros(decays.shape)
    heights = list(enumerate(tree.heights(per, n + 1)))
    if root is not None:
        totals[heights.pop()[0], 0] = np.asarray(root, np.float64)
        place -= 1
    for height, (nodes, parts) in reversed(heights):
        job, place = job - nodes * parts, place - nodes
        for i in range(n >> height):
            parent, left = totals.get((height + 1, i // 2)), i // 2
            if i % 2:
                totals[height, i] = parent
                continue
            own = sums[:, :, job + left * parts :][:, :, :parts].sum(axis=2)
            if parent is not None:
                own += decays[:, :, place + left, None, None] * parent
                of_decays[:, :, place + left] = (parent * states[:, :, place + left]).sum((2, 3))
            totals[height, i] = own
    return np.stack([totals[0, i] for i in range(n)], axis=2), of_decays


def check(context, sizes, blocks, per, is_whole=False):
    """`is_whole`: all but the last block are a tree whose root has readers elsewhere."""
    args = arguments(*sizes, blocks, per)

    @jax.jit
    def run(sums, states, decays, root):
        return tree_gradients(sums, states, decays, per, root)

    root = None
    if is_whole:
        sums, *rest = args
        parts = tree.heights(per, blocks)[-1][1]
        args, root = (sums[:, :, :-parts], *rest), normal((blocks, 3), *sums[:, :, 0].shape)
    leaves, of_decays = run_in(context, run, *args, root)
    want, want_of_decays = definition(*args, per, root)
    # Nearly all are the float64 values rounded once.
    assert leaves.dtype == bf16
    close(leaves, jnp.asarray(want, f32).astype(bf16), 2e-4)
    close(of_decays, want_of_decays, 2e-6)


@pytest.mark.parametrize(
    "blocks, per, span",
    [
        (2, 4, 32),  # one leaf block before the last
        (15, 2, 4),  # the right edge is no full tree; high nodes in two parts and four
        pytest.param(16, 4, 32, marks=pytest.mark.slow),
        pytest.param(39, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_is_the_definition(monkeypatch, blocks, per, span):
    monkeypatch.setattr(tree, "SPAN", span)
    check(jla.pallas.interpret, (1, 2, 64, 64), blocks, per)


@pytest.mark.parametrize("blocks", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_the_root_has_readers_elsewhere(monkeypatch, blocks):
    monkeypatch.setattr(tree, "SPAN", 4)
    check(jla.pallas.interpret, (1, 2, 64, 64), blocks, 4, is_whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("V, K", [(64, 128), (128, 128)])
def test_wide_states(V, K):
    check(jla.pallas.interpret, (2, 1, V, K), 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes, blocks", [((16, 8, 128, 128), 16), ((1, 3, 128, 64), 512), ((2, 3, 64, 64), 391)]
)
def test_on_a_gpu(sizes, blocks):
    check(contextlib.nullcontext, sizes, blocks, 4)
    check(contextlib.nullcontext, sizes, 513, 4, is_whole=True)


@pytest.mark.parametrize("sizes, blocks", [((16, 8, 128, 128), 16), ((1, 16, 128, 128), 512)])
def test_lowers_for_cuda(sizes, blocks):
    """At T = 4096 and 131072, with the most of SMEM."""
    up = jax.eval_shape(functools.partial(leaves_and_decays, *sizes, blocks - 1))
    down = jax.eval_shape(functools.partial(arguments, *sizes, blocks, 4))
    for run, args in ((tree_states, up), (functools.partial(tree_gradients, per=4), down)):
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 1
