"""Log-linear attention's kernels with a piece of the sequence on each device.

vmap's axis is in the place of a mesh's: the exchange works over it, too, and the pieces are rows to
the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from operands import parts_of_arrays

import jla
import jla.pallas
from jla.pallas import log_linear as kernels
from jla.pallas.log_linear import tree

f32, bf16 = jnp.float32, jnp.bfloat16


def arguments(B, T, gate, H=1, HK=1, K=64, V=64):
    L = (T - 1).bit_length() + 2  # one more than is needed: the last state is whole
    q, k = (normal(i, B, T, HK, K).astype(bf16) for i in range(2))
    g = -gate * jax.nn.softplus(2 * normal(3, B, T, H))
    return q, k, normal(2, B, T, H, V).astype(bf16), g, normal(4, B, T, H, L)


def both(implementation, args, cotangents, **options):
    def run(*args):
        o, state = jla.log_linear_attention(*args, implementation=implementation, **options)
        return o, state.levels

    (o, levels), vjp = jax.vjp(run, *args)
    return (o, levels), vjp((cotangents[0].astype(o.dtype), cotangents[1]))


def check(size, T, gate, tolerance=5e-3, context=jla.pallas.interpret, **sizes):
    args = arguments(1, size * T, gate, **sizes)
    (B, _, H, L), K, V = args[4].shape, args[1].shape[3], args[2].shape[3]
    cotangents = normal(9, *args[2].shape), normal(8, B, H, L, K, V)
    of_state = jnp.stack([cotangents[1]] + [jnp.zeros_like(cotangents[1])] * (size - 1))

    def pieces(x):
        return jnp.stack(jnp.split(x, size, axis=1))

    mapped = functools.partial(both, "pallas", axis_name="seq")
    mapped = jax.jit(jax.vmap(mapped, axis_name="seq"))
    with context():
        got = mapped(tuple(map(pieces, args)), (pieces(cotangents[0]), of_state))
    (o, levels), gradients = got
    joined = [jnp.concatenate(list(x), axis=1) for x in (o, *gradients)]
    whole = tuple(x.astype(f32) for x in args)
    want = evaluated(jax.jit(functools.partial(both, "reference")))(whole, cotangents)
    for ours, theirs in zip([levels[0], *joined], [want[0][1], want[0][0], *want[1]], strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "size, T, gate",
    [
        (2, 256, 0.01),  # two leaf blocks a device, and the state of the other is read by all
        pytest.param(2, 256, 1.5, marks=pytest.mark.slow),  # by the first chunk alone
        pytest.param(3, 128, 0.01, marks=pytest.mark.slow),  # one leaf block
        pytest.param(4, 16, 0.1, marks=pytest.mark.slow),  # less than a chunk
    ],
)
def test_is_the_reference(monkeypatch, size, T, gate):
    monkeypatch.setattr(kernels, "LEAF_BLOCK", 128)
    monkeypatch.setattr(tree, "SPAN", 1)
    monkeypatch.setattr(tree, "OTHERS_SPAN", 2)
    check(size, T, gate)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_types_fit_on_a_mesh(kind):
    """Over data, sequence and heads, of either kind: those of the gradients too."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "seq", "model"), (kind,) * 3, devices=jax.devices()[:8]
    )
    args = arguments(2, 32, 0.1, H=4, HK=2)
    places = (NamedSharding(mesh, PartitionSpec("data", "seq", "model")) for _ in args)
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y)
        for x, y in zip(args, places, strict=True)
    ]
    run = jla.sharded(jla.log_linear_attention, B="data", T="seq", H="model")

    def gradients(*args):
        (o, state), vjp = jax.vjp(lambda *args: run(*args, implementation="pallas"), *args)
        return o, state, vjp((o, jax.tree.map(jnp.zeros_like, state)))[:5]

    with jla.pallas.interpret(), jax.set_mesh(mesh):
        o, state, of_args = jax.eval_shape(gradients, *args)
    assert (o.shape, o.dtype) == (args[2].shape, args[2].dtype)
    assert state.levels.shape == (2, 4, args[4].shape[3], 64, 64)
    assert [x.shape for x in of_args] == [x.shape for x in args]


def test_lowers_for_cuda():
    """At 131072 tokens a device, with as many kernels as one device alone has."""
    mesh = jax.make_mesh((2,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:2])
    shapes = jax.eval_shape(lambda: arguments(1, 2 * 131072, 0.1, H=16, K=128, V=128))

    def run(*args):
        run = functools.partial(jla.log_linear_attention, axis_name="seq", implementation="pallas")
        o, vjp = jax.vjp(lambda *args: run(*args)[0], *args)
        return o, *vjp(o)

    spec = PartitionSpec(None, "seq")
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jla.pallas, "unsupported_device", lambda: None)
        lowered = run.trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 7
    assert parts_of_arrays(lowered) == []
