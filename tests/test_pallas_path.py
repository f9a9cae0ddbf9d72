"""PaTH attention's kernels: what the contract's tests do not reach.

The tree over several leaves, the cache in several blocks, the step at all kinds of lengths, and
that the step's kernel fits at full size and updates its keys in place.
"""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, normal
from evaluator import evaluated

import jla
import jla.pallas
from jla import PathCache
from jla._core import path_cache as around
from jla.pallas import path_attention as kernels
from jla.pallas.path_attention import chains, dyadic, settle, step
from jla.reference import path_attention as reference

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def tokens(*shape, H=1, HQ=2, K=16, V=16, gated=True, dtype=bf16):
    """q, k, v, w, beta, g of [B, T] tokens, or of the one token of each of [B] rows."""
    q, k, v, w = (normal(i, *shape, *x) for i, x in enumerate(((HQ, K), (H, K), (H, V), (H, K))))
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    beta = 2 * jax.nn.sigmoid(normal(4, *shape, H) + 1.0)
    g = -0.2 * jax.nn.softplus(2 * normal(5, *shape, HQ)) if gated else None
    return *(x.astype(dtype) for x in (q, k, v)), w, beta, g


def cached(lengths, capacity, H=1, HQ=2, K=16, V=16, gated=True, dtype=bf16):
    length = jnp.asarray(lengths, jnp.int32)
    there = (jnp.arange(capacity)[None] < length[:, None])[..., None]
    shape = len(lengths), capacity
    return PathCache(
        jnp.where(there[..., None], normal(6, *shape, H, K), 0.0),
        jnp.where(there[..., None], normal(7, *shape, H, V), 0.0).astype(dtype),
        jnp.where(there, -jax.nn.softplus(normal(8, *shape, HQ)), 0.0) if gated else None,
        length,
    )


def relative_error(got, want):
    got, want = (np.asarray(x.astype(f32), np.float64) for x in (got, want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    got, want = np.nan_to_num(got), np.nan_to_num(want)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-10)


def largest_error(got, want):
    return max(jax.tree.leaves(jax.tree.map(relative_error, got, want)))


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 13])
def test_any_two_leaves_meet_once(leaves):
    """At one level, where each has a place of its own, among as many as there are."""
    counts = dyadic.query_counts(leaves), dyadic.key_counts(leaves)
    used = [set(), set()]
    for j, i in itertools.combinations(range(leaves), 2):
        (m,) = (
            m
            for m in range(dyadic.number(leaves))
            if int(dyadic.at_bit(jnp.int32(i), m)) == 1
            and int(dyadic.at_bit(jnp.int32(j), m)) == 0
            and dyadic.block(jnp.int32(i), m) == dyadic.block(jnp.int32(j), m)
        )
        for leaf, count, places in zip((i, j), counts, used, strict=True):
            place = int(dyadic.place(count, jnp.int32(leaf), m))
            assert 0 <= place - dyadic.offset(count, m) < count[m]
            places.add((leaf, place))
    for count, places in zip(counts, used, strict=True):
        assert sorted(place for _, place in places) == list(range(sum(count)))


def values_and_gradients(implementation, arrays, cotangent, segment_ids):
    def run(*arrays):
        path_attention = functools.partial(jla.path_attention, implementation=implementation)
        return path_attention(*arrays, segment_ids=segment_ids)[0]

    o, vjp = jax.vjp(run, *arrays)
    return o, vjp(cotangent.astype(o.dtype))


@pytest.mark.parametrize(
    "T, H, HQ",
    [
        (140, 1, 2),
        pytest.param(140, 2, 4, marks=pytest.mark.slow),
        # Three leaves, the last of 44 tokens: two levels, a leaf without a version at one of them.
        pytest.param(300, 1, 1, marks=pytest.mark.slow),
        # Eight: the last has three versions, the others one or two.
        pytest.param(980, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_several_leaves_are_the_reference(T, H, HQ):
    arrays, cotangent = tokens(1, T, H=H, HQ=HQ), normal(9, 1, T, HQ, 16)
    lengths = jnp.asarray([40, T - 50, 10])
    ids = jnp.repeat(jnp.arange(3), lengths, total_repeat_length=T)[None]
    with jla.pallas.interpret():
        run = evaluated(jax.jit(functools.partial(values_and_gradients, "pallas")))
        got = run(arrays, cotangent, ids)
    arrays = jax.tree.map(lambda x: x.astype(f32), arrays)
    definition = jax.jit(functools.partial(values_and_gradients, "reference"))
    want = evaluated(definition)(arrays, cotangent, ids)
    assert largest_error(got[0], want[0]) < 5e-3
    assert largest_error(got[1], want[1]) < 1e-2


@pytest.mark.parametrize("right", [True, False])
def test_chains_move_each_head_by_its_own_transforms(right):
    """Four leaves, two heads of queries, or of keys, to each of the transforms'."""
    leaves, H, heads, K = 4, 2, 4, 64
    counts = (dyadic.query_counts if right else dyadic.key_counts)(leaves)
    blocks = dyadic.block_counts(leaves)
    versions = np.array(normal(0, 1, heads, sum(counts) * dyadic.LEAF, K).astype(f16))
    transforms = normal(1, 1, H, sum(blocks), K, K).astype(f16) / 8
    want, moved = versions.astype(np.float32), 0
    for h, leaf in itertools.product(range(heads), range(leaves)):
        before = passed = None
        for m in range(dyadic.number(leaves)):
            half = leaf >> m
            sibling = half ^ 1
            if half % 2 != right or (not right and sibling << m >= leaves):
                continue  # a query's version is for keys before it, a key's for queries behind it
            first = dyadic.LEAF * int(dyadic.place(counts, jnp.int32(leaf), m))
            rows = slice(first, first + dyadic.LEAF)
            if before is not None:
                matrix = np.asarray(transforms[0, h // 2, passed], np.float32)
                want[0, h, rows] = before @ (matrix if right else matrix.T)
                versions[0, h, rows] = 0
                moved += 1
            before, passed = want[0, h, rows], dyadic.offset(blocks, m) + sibling
    assert moved == heads
    run = chains.query_chains if right else chains.key_chains
    with jla.pallas.interpret():
        got = run(jnp.asarray(versions), transforms, leaves)
    assert largest_error(got, want) < 1e-3


def check_parts(context, monkeypatch, *shape, **sizes):
    """The backward pass by one row at a time is that by all rows.

    To the bit but for the gates', which XLA may sum in another order.
    """
    arrays = tokens(*shape, **sizes)
    cotangent = normal(9, *arrays[0].shape[:3], arrays[2].shape[3]).astype(bf16)

    def gradients(busy):
        monkeypatch.setattr(kernels, "BUSY", busy)

        # Anew each time, and without the function's own jit, for it to see that BUSY has changed.
        def run(arrays):
            path_attention = functools.partial(kernels.path_attention.__wrapped__, scale=0.3)
            _, vjp = jax.vjp(lambda *arrays: path_attention(*arrays, None, None)[0], *arrays)
            return vjp(cotangent)

        with context():
            traced = jax.jit(run).trace(arrays)
            in_parts = " empty[" in str(traced.jaxpr)  # where the parts go
            return in_parts, traced.lower().compile()(arrays)

    (split, parts), (all_at_once, whole) = gradients(0), gradients(2**30)
    assert split and not all_at_once
    jax.tree.map(np.testing.assert_array_equal, parts[:5], whole[:5])
    for ours, theirs in zip(parts[5:], whole[5:], strict=True):
        if ours is not None:
            close(ours, theirs, 1e-6)


@pytest.mark.slow
def test_rows_in_parts_are_the_whole(monkeypatch):
    check_parts(jla.pallas.interpret, monkeypatch, 2, 20, HQ=1)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_rows_in_parts_are_the_whole_on_a_gpu(monkeypatch, gated):
    # With a head for each: XLA may leave out the rounding of a group's sum.
    sizes = dict(H=4, HQ=4, K=128, V=128, gated=gated)
    check_parts(contextlib.nullcontext, monkeypatch, 3, 1000, **sizes)


def test_cache_in_blocks_is_the_reference(monkeypatch):
    """Several blocks of queries and of cached tokens; the last of these are empty, and not read."""
    monkeypatch.setattr(around, "QUERIES", 16)
    monkeypatch.setattr(around, "KEYS", 8)
    arrays, cache = tokens(2, 20), cached((19, 3), 45)
    with jla.pallas.interpret():
        run = jax.jit(functools.partial(kernels.path_attention, scale=0.3))
        got = evaluated(run)(*arrays, cache, None)
    want = jla.path_attention(*arrays, cache=cache, scale=0.3, implementation="reference")
    assert largest_error(got, want) < 5e-3


@pytest.mark.parametrize(
    "lengths, sizes",
    [
        ((299, 300, 0), dict(capacity=300, HQ=6, H=2, V=32)),  # two pieces, a full row
        ((3, 33), dict(capacity=77, HQ=9, K=32, gated=False, dtype=f16)),  # two passes
        pytest.param(
            (256,), dict(capacity=600, HQ=1, K=128, V=64, dtype=f32), marks=pytest.mark.slow
        ),  # a piece to clear
    ],
    ids=str,
)
def test_step_is_the_reference(lengths, sizes):
    check_step(jla.pallas.interpret, lengths, sizes)


@pytest.mark.parametrize(
    "lengths, sizes, key_dtype",
    [
        # No settled key; the 64th token.
        ((5, 127), dict(capacity=192, HQ=2, V=32), f32),
        # Two passes; a row that becomes full, and a full one.
        ((127, 128), dict(capacity=128, HQ=9, gated=False), bf16),
        # A kernel moves them on: two pieces and a tile's rest, no settled key, no 64th token.
        ((255, 63, 70), dict(capacity=264, HQ=2, K=64, V=16, gated=False), f32),
    ],
    ids=str,
)
def test_lazy_step_is_the_settled_ones(lengths, sizes, key_dtype, monkeypatch):
    monkeypatch.setattr(settle, "PIECE", 3)
    check_lazy_step(jla.pallas.interpret, lengths, sizes, key_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("key_dtype", [f32, bf16])
def test_lazy_step_is_the_settled_ones_on_a_gpu(key_dtype):
    """A row of two pieces that moves on, one that does not, and an almost empty one."""
    sizes = dict(capacity=4104, H=4, HQ=4, K=128, V=128, gated=False)
    check_lazy_step(contextlib.nullcontext, (4095, 4000, 63), sizes, key_dtype)


def check_lazy_step(context, lengths, sizes, key_dtype):
    arrays = tokens(len(lengths), **{n: x for n, x in sizes.items() if n != "capacity"})
    cache = in_decoding(cached(lengths, **sizes), key_dtype)
    want, definition, got = (
        evaluated(jax.jit(functools.partial(x.path_step, scale=0.3)))
        for x in (reference, reference, kernels)
    )
    want = want(*arrays, cache.settled())
    with context():
        got = got(*arrays, cache)
    for o, new in (got, definition(*arrays, cache)):
        assert new.key.dtype == key_dtype and not jnp.isnan(new.recent).any()
        rounding = 2e-6 if key_dtype == f32 else 4e-3  # of those that move on
        assert largest_error(o, want[0]) < (2e-6 if o.dtype == f32 else 1e-2)
        assert largest_error(new.settled(), want[1]) < rounding


def in_decoding(cache, key_dtype=f32):
    """Lazy, after tokens since the keys were settled; NaN in what is not in use."""
    lazy, S = cache.lazy(key_dtype), cache.key.shape[1]
    first = jnp.minimum(cache.length, S) // 64 * 64
    some = (cache.length > first)[:, None, None, None]
    change = jnp.where(some, 0.1 * normal(9, *lazy.change.shape), 0.0)

    def unused(x, first, used):
        place = first + jnp.arange(x.shape[1])[None]
        return jnp.where((place < used[:, None])[..., None, None], x, jnp.nan).astype(x.dtype)

    recent = unused(lazy.recent, first[:, None], cache.length)
    return lazy._replace(key=unused(lazy.key, 0, first), recent=recent, change=change)


def test_lazy_steps_are_the_others():
    """From rows of unlike lengths, over the tokens with which each one's keys move on."""
    arrays = tokens(2, 40, gated=False, dtype=f32)[:5]
    eager = cached((61, 100), 140, gated=False, dtype=f32)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(cache, implementation):
        def one(cache, token):
            step = functools.partial(jla.path_step, scale=0.3, implementation=implementation)
            o, cache = step(*token, None, cache)
            return cache, o

        return jax.lax.scan(one, cache, [jnp.moveaxis(x, 1, 0) for x in arrays])

    (want, want_o), (got, o) = run(eager, "reference"), run(eager.lazy(), "xla")
    assert largest_error((o, got.settled()), (want_o, want)) < 2e-6


@pytest.mark.gpu
def test_step_stays_in_its_row():
    """One head's keys of a row lie right before those of the next; the last tile is not full."""
    lengths = (76, 3, 40, 76)
    check_step(contextlib.nullcontext, lengths, dict(capacity=77, K=128, V=128, gated=False))


def test_step_into_other_memory(monkeypatch):
    """XLA may drop the alias of the keys: then the rest of the cache is cleared, in all pieces."""
    kernel, made = step.mosaic.kernel, []

    def elsewhere(*x, in_place, **y):
        made.append(in_place)
        return kernel(*x, **y)

    monkeypatch.setattr(step.mosaic, "kernel", elsewhere)
    # These sizes are no other test's: what JAX has traced before it does not trace again.
    check_step(jla.pallas.interpret, (3, 40), dict(capacity=300, HQ=1, gated=False))
    assert len(made) == 1 and all(made)


def check_step(context, lengths, sizes):
    cache = cached(lengths, **sizes)
    arrays = tokens(len(lengths), **{n: x for n, x in sizes.items() if n != "capacity"})
    # Under jit no length is known, and none refused.
    want, got = (
        evaluated(jax.jit(functools.partial(x.path_step, scale=0.3))) for x in (reference, kernels)
    )
    want = want(*arrays, cache)
    with context():
        got = got(*arrays, cache)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)
    assert largest_error(got[0], want[0]) < (2e-6 if got[0].dtype == f32 else 1e-3)
    assert largest_error(got[1], want[1]) < 2e-6


def test_step_differentiates():
    arrays, cache = tokens(1, gated=False), cached((5,), 16, gated=False)

    def loss(step, key, value):
        o, new = step(*arrays, PathCache(key, value, None, cache.length), scale=0.3)
        return jnp.sum(o.astype(f32)) + jnp.sum(new.key**2)

    def gradient(step):
        return evaluated(jax.jit(jax.grad(functools.partial(loss, step), (0, 1))))(*cache[:2])

    with jla.pallas.interpret():
        got = gradient(kernels.path_step)
    assert largest_error(got, gradient(reference.path_step)) < 2e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [dict(H=16, HQ=16), dict(H=4, HQ=32)], ids=str)
def test_step_lowers_for_cuda_in_place(sizes, gated):
    sizes = dict(K=128, V=128, gated=gated) | sizes
    shapes = jax.eval_shape(lambda: (*tokens(64, **sizes), cached((8191,) * 64, 8192, **sizes)))
    step = jax.jit(functools.partial(kernels.path_step, scale=0.1), donate_argnums=6)
    text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # All the cache's arrays are outputs' memory ...
    assert len(re.findall(r"tf.aliasing_output = [1-4]\b", text)) == 3 + gated
    # ... and the kernel's sixth operand is its fourth result.
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
    alias = re.search(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert alias.groups() == ("3", "5")


def test_step_refuses_other_sizes():
    arrays, cache = tokens(1, K=48), cached((5,), 16, K=48)
    message = r"K=48 and V=16.*16, 32, 64 and 128.*\"xla\" can"
    with jla.pallas.interpret(), pytest.raises(NotImplementedError, match=message):
        jla.path_step(*arrays, cache, implementation="pallas")
