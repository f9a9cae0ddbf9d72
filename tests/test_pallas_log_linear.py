"""Log-linear attention's kernels: what the contract's tests do not reach.

The tree over several leaf blocks, the parts of its gradient, the step at all kinds of positions,
and that the kernels fit at full size.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import mamba2_in_steps, normal
from evaluator import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla
import jla.pallas
from jla import LazyLogLinearState, LogLinearState
from jla._core import alignment
from jla._core import level_weights as weights
from jla._core.states import levels_in_use
from jla.linen import LogLinearMamba2
from jla.pallas import log_linear as kernels
from jla.pallas.log_linear import step, tree

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B, T, H=1, HK=1, K=64, V=64, dtype=bf16):
    L = (T - 1).bit_length() + 1
    q, k = (normal(i, B, T, HK, K).astype(dtype) for i in range(2))
    g = -0.1 * jax.nn.softplus(2 * normal(3, B, T, H))
    return q, k, normal(2, B, T, H, V).astype(dtype), g, normal(4, B, T, H, L)


def test_an_empty_past_is_not_read():
    """No product is made for it: one with NaN would show."""
    q, _, _, g, scales = arguments(2, 4, K=16, V=16)
    for position in ((0, 0), (0, 5)):
        state = LogLinearState(jnp.ones((2, 1, 3, 16, 16)), jnp.asarray(position, jnp.int32))
        at = state.position[:, None] + jnp.arange(4, dtype=jnp.int32)[None]
        o = alignment.read_levels(jnp.nan * q, scales, g, at, state)
        np.testing.assert_array_equal(jnp.isnan(o).any(), position != (0, 0))


def step_arguments(positions, H=1, HK=1, K=32, V=32, L=8, dtype=bf16):
    B, position = len(positions), jnp.asarray(positions, jnp.int32)
    level = jnp.arange(L)[None]
    used = (level > 0) & ((position[:, None] >> jnp.maximum(level - 1, 0)) % 2 == 1)
    levels = jnp.where(used[:, None, :, None, None], normal(5, B, H, L, K, V), 0.0)
    arrays = normal(0, B, HK, K), normal(1, B, HK, K), normal(2, B, H, V)
    g = -jax.nn.softplus(normal(3, B, H))
    state = LogLinearState(levels, position)
    return *(x.astype(dtype) for x in arrays), g, normal(4, B, H, L), state


def lazy_arguments(positions, **sizes):
    """Of a state in the midst of decoding; NaN in what is not in use."""
    *args, (levels, position) = step_arguments(positions, **sizes)
    used = levels_in_use(position, levels.shape[2])[:, None]
    decays = jnp.where(used, -jax.nn.softplus(normal(6, *levels.shape[:3])), jnp.nan)
    levels = jnp.where(used[..., None, None], levels, jnp.nan)
    return *args, LazyLogLinearState(levels, position, decays)


def relative_error(got, want):
    got, want = (np.asarray(x.astype(f32), np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.slow
def test_several_leaf_blocks_are_the_reference(monkeypatch):
    """Five blocks of 64 tokens: three heights, the last block cut, and readers in parts."""
    monkeypatch.setattr(kernels, "LEAF_BLOCK", 64)
    monkeypatch.setattr(tree, "SPAN", 2)
    args = arguments(1, 290)
    cotangent = normal(9, *args[2].shape)

    def both(core, *args):
        o, vjp = jax.vjp(core, *args)
        return o, *vjp(cotangent.astype(o.dtype))

    @jax.jit
    def definition(*args):
        run = functools.partial(jla.log_linear_attention, implementation="reference")
        return both(lambda *args: run(*args)[0], *args)

    with jla.pallas.interpret():
        got = jax.jit(functools.partial(both, lambda *args: kernels.core(*args)))(*args)
    want = definition(*(x.astype(f32) for x in args))
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 5e-3


def mamba2_arguments(B, T, **sizes):
    q, k, u, g, logits = arguments(B, T, **sizes)
    value_scales, skip = jax.nn.softplus(normal(5, *g.shape)), 1 + 0.5 * normal(6, g.shape[2])
    return q, k, u, g, logits.astype(q.dtype), value_scales, skip


def with_gradients(run, args, ids=None):
    o, vjp = jax.vjp(lambda *args: run(*args, ids), *args)
    return o, *vjp(jax.random.normal(jax.random.key(9), o.shape).astype(o.dtype))


def check_mamba2(got, want, tolerance):
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize(
    "T, packed",
    [
        (150, False),
        pytest.param(150, True, marks=pytest.mark.slow),
        pytest.param(60, False, marks=pytest.mark.slow),  # one leaf block, no states
    ],
)
def test_mamba2_values_and_skip(monkeypatch, T, packed):
    """Three leaf blocks: the scales are in the weights of pairs, and in those of the states."""
    monkeypatch.setattr(kernels, "LEAF_BLOCK", 64)
    args = mamba2_arguments(1, T, H=2)
    ids = jnp.searchsorted(jnp.array([9, 20, 100]), jnp.arange(T), side="right")[None]
    ids = ids if packed else None
    # Not the function that is jitted, whose programs may be of another LEAF_BLOCK.
    run = kernels.log_linear_mamba2.__wrapped__
    with jla.pallas.interpret():
        got = evaluated(jax.jit(functools.partial(with_gradients, run)))(args, ids)
    definition = functools.partial(mamba2_in_steps, implementation="reference")
    wide = evaluated(jax.jit(functools.partial(with_gradients, definition)))
    want = wide([x.astype(f32) for x in args], ids)
    want = [x.astype(y.dtype) for x, y in zip(want, (args[2], *args), strict=True)]
    check_mamba2(got, want, 5e-3)


def test_mamba2_lowers_for_cuda():
    args = jax.eval_shape(lambda: mamba2_arguments(8, 4096, H=8, K=128, V=128))
    run = jax.jit(functools.partial(with_gradients, kernels.log_linear_mamba2))
    text = run.trace(args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 7


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_mamba2_on_a_gpu(packed):
    args = mamba2_arguments(2, 4096, H=8, K=128, V=128)
    ids = jnp.cumsum(jax.random.bernoulli(jax.random.key(8), 1e-2, (2, 4096)), axis=1)
    ids = ids if packed else None
    run = jax.jit(functools.partial(with_gradients, kernels.log_linear_mamba2))
    got = run(args, ids)
    jax.tree.map(np.testing.assert_array_equal, got, run(args, ids))
    in_steps = functools.partial(mamba2_in_steps, implementation="pallas")
    check_mamba2(got, jax.jit(functools.partial(with_gradients, in_steps))(args, ids), 5e-3)


@pytest.mark.parametrize("call", [(), ("ids",), ("mask",)], ids=str)
def test_the_layer_uses_mamba2(monkeypatch, call):
    """With its arguments; the values that `_fused` promises for them are tested there."""
    made = []

    def stand_in(q, k, u, g, logits, dt, skip, ids):
        made.append((*(x.shape for x in (q, k, u, g, logits, dt, skip)), ids is not None))
        return u

    monkeypatch.setattr(kernels, "log_linear_mamba2", stand_in)
    options = dict(num_heads=2, key_dim=64, conv_size=None, num_levels=5, dtype=bf16)
    layer = LogLinearMamba2(**options, implementation="pallas")
    x = jax.ShapeDtypeStruct((2, 9, 32), bf16)
    arrays = dict(segment_ids=jnp.arange(9)[None].repeat(2, 0) // 4) if "ids" in call else {}
    if "mask" in call:
        arrays["mask"] = jnp.arange(9)[None] < jnp.array([[9], [5]])
    with jla.pallas.interpret():
        params = jax.eval_shape(layer.init, jax.random.key(1), x)
        made.clear()
        jax.eval_shape(functools.partial(layer.apply, **arrays), params, x)
    keys, values, heads = (2, 9, 1, 64), (2, 9, 2, 64), (2, 9, 2)
    assert made == [(keys, keys, values, heads, (*heads, 5), heads, (2,), "ids" in call)]


@pytest.mark.parametrize("blocks, per, span", [(2, 4, 32), (7, 2, 4), (16, 4, 8), (13, 1, 2)])
def test_jobs_read_every_state_once(monkeypatch, blocks, per, span):
    """Each chunk's jobs are those of the set bits of its block's number."""
    monkeypatch.setattr(tree, "SPAN", span)
    chunks, inside = blocks * per - (per > 1), 7
    heights = tree.heights(per, blocks)
    assert sum(nodes for nodes, _ in heights) == blocks - 1
    job = tree.reader_jobs(chunks, per, blocks, inside)
    j, readers = 0, []
    for m, (nodes, parts) in enumerate(heights):
        for node in range(nodes):
            for _ in range(parts):
                first, count, plane = map(int, job(jnp.int32(j)))
                assert count <= span and plane == inside + 1 + m
                readers += [(m, node, chunk) for chunk in range(first, first + count)]
                j += 1
    want = [
        (m, (chunk // per >> m) // 2, chunk)
        for chunk in range(chunks)
        for m in range(len(heights))
        if chunk // per >> m & 1
    ]
    assert sorted(readers) == sorted(want)


def test_weights_are_decays():
    """Of two tokens at their level, in more than 64 * 64 tokens, beside a gate of -1e4."""
    T, rng = 5000, np.random.default_rng(0)
    g = -0.01 * rng.random((1, T, 1))
    g[0, 1234] = -1e4
    of_pairs = jax.jit(weights.weights, static_argnums=2)
    w, _ = of_pairs(jnp.asarray(g, f32), jnp.ones((1, T, 1, 14)), 256)
    w = np.asarray(w)[0, 0].transpose(1, 0, 2).reshape(w.shape[3], -1)
    for s, t in np.sort(rng.integers(0, T, (200, 2)), axis=1):
        level = int(s ^ t).bit_length()
        want = np.exp(g[0, s + 1 : t + 1].sum()) if s != t else 1.0
        got = w[level, s] * w[level, t] if s != t else w[0, t]
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "positions, sizes",
    [
        ((0, 5, 7, 100), dict(H=4, HK=2, V=48)),
        ((7, 8, 3), dict(K=16, V=16, L=4, dtype=f16)),  # two rows outgrow their levels
        ((15,), dict(H=2, HK=2, K=128, V=128, L=6, dtype=f32)),
    ],
    ids=str,
)
def test_step_is_the_reference(positions, sizes):
    args = step_arguments(positions, **sizes)
    # Under jit no position is known, and none refused.
    step = functools.partial(jla.log_linear_step, implementation="reference")
    want_o, want = evaluated(jax.jit(step))(*args)
    with jla.pallas.interpret():
        o, state = evaluated(jax.jit(kernels.log_linear_step))(*args)
    check_step((o, state), (want_o, want))


@pytest.mark.parametrize(
    "positions, sizes",
    [
        # One token alone, merges, some levels kept; the last place, and beyond it.
        ((0, 5, 7, 100), dict(H=4, HK=2, V=48)),
        ((7, 8, 3), dict(K=16, V=16, L=4, dtype=f16)),
    ],
    ids=str,
)
def test_lazy_step_is_the_settled_ones(positions, sizes):
    args = lazy_arguments(positions, **sizes)
    definition = jax.jit(functools.partial(jla.log_linear_step, implementation="reference"))
    want = evaluated(definition)(*args[:-1], args[-1].settled())
    with jla.pallas.interpret():
        got = jax.jit(kernels.log_linear_step)(*args)
    for o, state in (got, definition(*args)):
        # What the step does not write stays; NaN there and in the sums reaches nobody.
        assert not jnp.isnan(state.log_decays).any()
        check_step((o, state.settled()), want)


def check_step(got, want):
    (o, state), (want_o, want) = got, want
    np.testing.assert_array_equal(state.position, want.position)
    for ours, theirs, tolerance in (
        (o, want_o, 2e-6 if o.dtype == f32 else 1e-3),
        (state.levels, want.levels, 2e-6),
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(jnp.isnan(ours), jnp.isnan(theirs))
        assert relative_error(jnp.nan_to_num(ours), jnp.nan_to_num(theirs)) < tolerance


def test_step_into_other_memory(monkeypatch):
    """XLA may drop the alias of the states: then the levels not in use are written, too."""
    # Three rows are no other test's: what JAX has traced before it does not trace again.
    args = step_arguments((5, 7, 0), K=16, V=16, L=5)
    want = jax.jit(functools.partial(jla.log_linear_step, implementation="reference"))(*args)
    kernel, made = step.mosaic.kernel, []

    def elsewhere(*x, in_place, **y):
        made.append(in_place)
        return kernel(*x, **y)

    monkeypatch.setattr(step.mosaic, "kernel", elsewhere)
    with jla.pallas.interpret():
        got = jax.jit(kernels.log_linear_step)(*args)
    check_step(got, want)
    # Of a lazy state those that are kept are copied, and none is left unwritten.
    args = lazy_arguments((5, 7, 0), K=16, V=16, L=5)
    with jla.pallas.interpret():
        o, state = jax.jit(kernels.log_linear_step)(*args)
    assert len(made) == 2 and all(made)
    assert jnp.isfinite(state.levels).all()
    definition = jax.jit(functools.partial(jla.log_linear_step, implementation="reference"))
    check_step((o, state.settled()), definition(*args[:-1], args[-1].settled()))


def test_step_differentiates():
    args = step_arguments((6,))

    def loss(step, *args):
        o, state = step(*args[:-1], args[-1]._replace(position=jnp.asarray([6], jnp.int32)))
        return jnp.sum(o.astype(f32)) + jnp.sum(state.levels**2)

    def gradient(step):
        of_levels = lambda levels: loss(step, *args[:-1], LogLinearState(levels, None))  # noqa: E731
        return jax.jit(jax.grad(of_levels))(args[-1].levels)

    with jla.pallas.interpret():
        got = gradient(kernels.log_linear_step)
    want = gradient(functools.partial(jla.log_linear_step, implementation="reference"))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("make", [step_arguments, lazy_arguments])
def test_step_lowers_for_cuda_in_place(make):
    positions = np.full(128, 4095)
    shapes = jax.eval_shape(lambda: make(positions, H=16, K=128, V=128, L=14))
    step = jax.jit(kernels.log_linear_step, donate_argnames="state")
    text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"%arg5: [^%]*tf.aliasing_output = 1", text)
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert aliases == [("1", "6")]


@pytest.mark.parametrize(
    "B, T, sizes, calls",
    [
        # As `log_linear_mamba2` above, without a skip.
        pytest.param(8, 4096, dict(H=16, K=128, V=128), 7, marks=pytest.mark.slow),
        (1, 100, dict(H=2, HK=2, K=128, V=64), 3),  # one leaf block: no states
    ],
    ids=str,
)
def test_lowers_for_cuda(B, T, sizes, calls):
    """Lowering checks layouts and the size of SMEM, which the interpreter does not."""
    shapes = jax.eval_shape(functools.partial(arguments, B, T, **sizes))

    @jax.jit
    def run(*args):
        o, vjp = jax.vjp(kernels.core, *args)
        return o, *vjp(o)

    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # The leaf blocks' states, those that are read, the outputs; the gradients of what is read, of
    # the leaf blocks' states, of readers and the read.
    assert text.count("@mosaic_gpu") == calls


@pytest.mark.parametrize(
    "HK, mamba2",
    [(1, False), (2, False), pytest.param(4, False, marks=pytest.mark.slow), (1, True)],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_heads_are_not_gathered(monkeypatch, kind, HK, mamba2):
    """With stand-ins for the kernels, which run on one CPU device only."""

    def gradients(q, k, v, do, w, skip=None, *, per):
        of_head = jnp.repeat(q, v.shape[2] // q.shape[2], axis=2)
        return of_head, of_head, do, w, *([] if skip is None else [2 * skip])

    monkeypatch.setattr(kernels, "_forward", lambda q, k, v, w, skip=None, *, per, keep: (v,))
    monkeypatch.setattr(kernels, "_backward", gradients)
    sizes = dict(H=4, HK=HK, K=16, V=16)
    args = mamba2_arguments(2, 40, **sizes) if mamba2 else arguments(2, 40, **sizes)
    mesh = jax.make_mesh((2,), ("x",), (kind,), devices=jax.devices("cpu")[:2])

    def place(x):
        heads = PartitionSpec("x") if x.ndim == 1 else PartitionSpec(None, None, "x")
        spec = PartitionSpec() if x.ndim > 1 and x.shape[2] == 1 else heads
        return jax.device_put(x, NamedSharding(mesh, spec))

    placed = tuple(map(place, args))
    run = kernels.core
    if mamba2:
        run = functools.partial(kernels.log_linear_mamba2.__wrapped__, segment_ids=None)

    def both(*args):
        o, vjp = jax.vjp(run, *args)
        return o, *vjp(o)

    shardings = tuple(x.sharding for x in (placed[2], *placed))
    compiled = jax.jit(both, out_shardings=shardings).lower(*placed).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    # The gradients of the keys and queries that all heads share are summed over the devices.
    assert ("all-reduce" in text) == (HK == 1)
    if mamba2:  # each row of the batch has its own copy of the skip's weights
        np.testing.assert_allclose(compiled(*placed)[-1], 4 * args[-1], rtol=1e-6)


@pytest.mark.parametrize(
    "dtype, sizes, message", [(f32, {}, "float32"), (bf16, dict(V=144), "V = 144.*at most 128")]
)
def test_unsupported(dtype, sizes, message):
    args = arguments(1, 8, dtype=dtype, **sizes)
    with pytest.raises(NotImplementedError, match=f"{message}.*xla"):
        jla.log_linear_attention(*args, implementation="pallas")
