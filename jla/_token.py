"""Operations of the layers, of one token, that kernels do in one: products of few rows, and what a
layer computes around its step.

As those of `jla._fused` they are chosen among implementations and private. A call of one token is
many small operations, each of which a GPU takes 0.002 ms or more to start.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jla._core.cache import LazyPathCache
from jla._core.states import GSAState, LazyLogLinearState, MesaState
from jla._core.types import (
    Array,
    GateBiases,
    GateRates,
    Implementation,
    KDAState,
    Keys,
    Queries,
    RawGates,
    Values,
)
from jla._dispatch import choose, serves

__all__ = [
    "gsa_token",
    "kda_token",
    "log_linear_token",
    "mesa_token",
    "path_token",
    "product_of_few",
    "products_of_few",
    "serves",
    "swiglu_of_few",
]


def product_of_few(
    x: Array, kernel: Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """x W of a few rows x [B, D] and a matrix [D, N]: [B, N] in x's dtype, summed in float32.

    The kernels read the matrix where it lies, on all processors; 16 bits, at most 64 rows.
    """
    return choose("product_of_few", implementation, x, kernel)(x, kernel)


def swiglu_of_few(
    x: Array, gate: Array, up: Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """silu(x W_gate) * (x W_up) of a few rows, as `product_of_few`; kernels round it once."""
    return choose("swiglu_of_few", implementation, x, gate, up)(x, gate, up)


def products_of_few(
    xs: Sequence[Array],
    kernels: Sequence[Array],
    taps: Sequence[Array | None],
    pasts: Sequence[Array | None],
    *,
    rounded: Sequence[bool],
    silu_twice: bool = False,
    implementation: Implementation | None = None,
) -> tuple[list[jax.Array], list[jax.Array | None]]:
    """Products of a few rows by several matrices, and short convolutions of them, for one token:

        y = x W, or   y = silu(taps[W - 1] x W + sum_i taps[i] past[:, i])

    Args:
      xs: for each matrix its rows [B, D]. kernels: [D, N].
      taps: [W, N], or None for no convolution. pasts: the products of the last W - 1 tokens, [B,
        W - 1, N]; or None.
      rounded: for each matrix whether its result has x's dtype; or float32, with nothing rounded on
        the way, as XLA would have it where it fuses.
      silu_twice: as in `short_convolution`.

    Returns:
      The results, [B, N], and the new pasts.
    """
    arrays: Any = tuple(xs), tuple(kernels), tuple(taps), tuple(pasts)
    run = choose("products_of_few", implementation, *arrays)
    return run(*arrays, rounded=tuple(rounded), silu_twice=silu_twice)


def kda_token(
    q: Queries,
    k: Keys,
    v: Values,
    f: RawGates,
    A_log: GateRates,
    dt_bias: GateBiases,
    b: Array,
    gate: Array,
    gate_bias: Array | None,
    norm_scale: Array,
    state: KDAState,
    *,
    lower_bound: float | None,
    strength: float,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, KDAState]:
    """One token of a layer of KDA, from the results of its convolutions to its norm's:

        g = kda_gate(f, A_log, dt_bias, lower_bound);   beta = strength sigmoid(b)
        o, state = kda_step(l2norm(q), l2norm(k), v, g, beta, state)
        y = rms_norm(o, norm_scale, gate, gate_bias)

    Args:
      b: [B, HV]. gate: [B, HV, V]. gate_bias: [HV, V] or None. norm_scale: [V].
      dtype: of y.
      others: as of `kda_step_from_projection`.
    """
    arrays = q, k, v, f, A_log, dt_bias, b, gate, gate_bias, norm_scale, state
    options: dict[str, Any] = dict(lower_bound=lower_bound, strength=strength, epsilon=epsilon)
    options["dtype"] = jnp.dtype(dtype)
    return choose("kda_token", implementation, *arrays)(*arrays, **options)


def gsa_token(
    q: Queries,
    k: Keys,
    v: Values,
    f: Array,
    state: GSAState,
    *,
    normalizer: float,
    scale: float | None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, GSAState]:
    """One token of a layer of GSA: `gsa_step` with g = logsigmoid(f) / normalizer, s = 1 - exp(g).

    Args:
      f: [B, H, M].
    """
    options: dict[str, Any] = dict(normalizer=normalizer)
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    return choose("gsa_token", implementation, q, k, v, f)(q, k, v, f, state, **options)


def mesa_token(
    q: Queries,
    k: Keys,
    v: Values,
    a: Array,
    a_bias: Array,
    b: Array,
    b_bias: Array,
    lambda_params: Array,
    gate: Array | None,
    norm_scale: Array,
    state: MesaState,
    *,
    lower_bound: float,
    cg_steps: int,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, MesaState]:
    """One token of a layer of MesaNet, from the results of its convolutions to its norm's:

        g = logsigmoid(a + a_bias);   beta = sigmoid(b + b_bias)
        lamb = softplus(lambda_params) + lower_bound
        o, state = mesa_step(l2norm(q), l2norm(k), v, g, beta, lamb, state)
        y = rms_norm(o, norm_scale, gate, activation=silu)

    Args:
      a, b: [B, H]. a_bias, b_bias: [H]. lambda_params: [H, K]. gate: [B, H, V] or None.
      norm_scale: [V].
      dtype: of y; the solution is as exact as that of `mesa_step` in it.
    """
    arrays = q, k, v, a, a_bias, b, b_bias, lambda_params, gate, norm_scale, state
    run = choose("mesa_token", implementation, *arrays)
    options: dict[str, Any] = dict(lower_bound=lower_bound, cg_steps=cg_steps, epsilon=epsilon)
    return run(*arrays, **options, dtype=jnp.dtype(dtype))


def log_linear_token(
    q: Queries,
    k: Keys,
    u: Values,
    d: Array,
    logits: Array,
    A_log: Array,
    dt_bias: Array,
    level_weight: Array,
    skip: Array,
    state: LazyLogLinearState,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, LazyLogLinearState]:
    """One token of a layer of log-linear Mamba-2: `log_linear_mamba2_step` with

        dt = softplus(d + dt_bias);   g = -exp(A_log) dt;   logits level_weight

    Args:
      d: [B, H]. A_log, dt_bias, skip: [H]. level_weight: [H, L]; all float32.
    """
    arrays = q, k, u, d, logits, A_log, dt_bias, level_weight, skip, state
    return choose("log_linear_token", implementation, *arrays)(*arrays)


def path_token(
    q: Queries,
    k: Keys,
    v: Values,
    w: Array,
    b: Array,
    b_bias: Array,
    cache: LazyPathCache,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, LazyPathCache]:
    """One token of a layer of PaTH attention without log decays: `path_step` with

        w = l2norm(w);   beta = 2 sigmoid(b + b_bias)

    Args:
      w: [B, H, K]. b: [B, H]. b_bias: [H], float32.
    """
    arrays = q, k, v, w, b, b_bias, cache
    return choose("path_token", implementation, *arrays)(*arrays, scale=scale)
