"""Errors of PaTH attention over long rows whose maps hardly shrink, against float64.

With beta = 2 every map is a reflection, so nothing that is rounded on the way dies away. Prints the
relative errors of outputs and gradients at some tokens, in the form of docs/path_attention.md; with
--steps those of outputs and of the last keys, where each token is one of `jla.path_step`.
"""

import argparse
import datetime
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import jla
from cases import unit

f32, f64 = jnp.float32, jnp.float64
TOKENS = 32  # whose outputs are compared, up to the last
NAMES = ("q", "k", "v", "w", "beta")


def make(case, T, H, D, dtype):
    """Inputs of one row. A beta near 2 reflects; one direction for all is the worst for w."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (1, T, H, D)).astype(dtype) for key in keys[:3])
    spread, least = {
        "w random, beta = 2": (1.0, 2.0),
        "w random, beta 1.9 to 2": (1.0, 1.9),
        "w near one direction, beta = 2": (0.1, 2.0),
        "one w for all, beta = 2": (0.0, 2.0),
    }[case]
    noise = jax.random.normal(keys[3], (1, T, H, D))
    w = noise if spread == 1.0 else jax.random.normal(keys[4], (D,)) + spread * noise
    beta = jnp.linspace(least, 2.0, T * H).reshape(1, T, H)
    return dict(q=q, k=k, v=v, w=unit(w), beta=beta)


CASES = (
    *("w random, beta = 2", "w random, beta 1.9 to 2"),
    *("w near one direction, beta = 2", "one w for all, beta = 2"),
)


def exact(q, k, v, w, beta, tokens):
    """The outputs [N, H, V] at `tokens` [N], by the recurrence of queries: from the last token back
    every query is multiplied by each map that it passes."""
    D = k.shape[-1]

    def token(queries, x):
        s, k, w, beta = x
        seen = (s <= tokens)[:, None]
        logits = jnp.where(seen, D**-0.5 * jnp.einsum("nhd,hd->nh", queries, k), -jnp.inf)
        overlap = jnp.where(seen, beta * jnp.einsum("nhd,hd->nh", queries, w), 0.0)
        return queries - overlap[..., None] * w, logits

    inputs = jnp.arange(len(k)), k, w, beta
    _, logits = jax.lax.scan(token, q[tokens], inputs, reverse=True)
    return jnp.einsum("snh,shv->nhv", jax.nn.softmax(logits, axis=0), v)


def errors(case, implementation, T, H, D):
    """{name: error} of the outputs at the tokens, and of the gradients that come of them."""
    inputs = make(case, T, H, D, f32 if implementation == "xla" else jnp.bfloat16)
    tokens = np.unique(np.linspace(0, T - 1, TOKENS).astype(np.int32))
    cotangent = jax.random.normal(jax.random.key(9), (len(tokens), H, D))

    @jax.jit
    def run(inputs):
        def outputs(inputs):
            o, _ = jla.path_attention(**inputs, implementation=implementation)
            return o[0, tokens].astype(f32)

        o, pull = jax.vjp(outputs, inputs)
        return dict(o=o) | pull(cotangent)[0]

    with jax.default_matmul_precision("highest"):
        got = run(inputs)
    with jax.enable_x64(True):

        @jax.jit
        def run_exact(inputs):
            arrays = [inputs[name][0].astype(f64) for name in NAMES]
            o, pull = jax.vjp(functools.partial(exact, tokens=tokens), *arrays)
            return dict(o=o) | dict(zip(NAMES, pull(cotangent.astype(f64)), strict=True))

        want = {name: np.asarray(x) for name, x in run_exact(inputs).items()}
    got = {name: np.asarray(x.astype(f32), np.float64) for name, x in got.items()}
    return {
        name: np.linalg.norm(got[name].reshape(x.shape) - x) / np.linalg.norm(x)
        for name, x in want.items()
    }


# The caches that steps go on from, by the dtype of their keys; None: no lazy one.
CACHES = {
    "PathCache": None,
    "lazy, float32": f32,
    "lazy, bfloat16": jnp.bfloat16,
    "lazy, float16": jnp.float16,
}


def step_errors(case, cache, implementation, T, H, D):
    """{name: error} of the outputs at the tokens, and of all keys in the end, after T steps."""
    key_dtype = CACHES[cache]
    inputs = make(case, T, H, D, jnp.float16 if key_dtype == jnp.float16 else jnp.bfloat16)
    tokens = np.unique(np.linspace(0, T - 1, TOKENS).astype(np.int32))

    @jax.jit
    def run(inputs):
        empty = jla.PathCache.empty(1, T, H, D, D, dtype=inputs["v"].dtype)
        start = empty if key_dtype is None else empty.lazy(key_dtype)

        def one(cache, token):
            o, cache = jla.path_step(**token, g=None, cache=cache, implementation=implementation)
            return cache, o[0]

        after, o = jax.lax.scan(one, start, {n: jnp.moveaxis(x, 1, 0) for n, x in inputs.items()})
        return o[tokens], (after if key_dtype is None else after.settled()).key[0]

    got = [np.asarray(x.astype(f32), np.float64) for x in run(inputs)]
    with jax.enable_x64(True):
        arrays = [inputs[name][0].astype(f64) for name in NAMES]
        o = jax.jit(functools.partial(exact, tokens=tokens))(*arrays)
        want = [np.asarray(x) for x in (o, jax.jit(exact_keys)(*arrays))]
    return {
        name: np.linalg.norm(x - y) / np.linalg.norm(y)
        for name, x, y in zip(("o", "keys"), got, want, strict=True)
    }


def exact_keys(q, k, v, w, beta):
    """The keys [T, H, K] as the last token sees them."""

    def token(maps, x):
        k, w, beta = x
        key = jnp.einsum("hkl,hl->hk", maps, k)
        overlap = beta[:, None] * jnp.einsum("hkl,hl->hk", maps, w)
        return maps - overlap[..., None] * w[:, None], key

    maps = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), (*k.shape[1:], k.shape[-1]))
    return jax.lax.scan(token, maps, (k, w, beta), reverse=True)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", default="pallas", choices=("xla", "pallas"))
    parser.add_argument("--steps", action="store_true", help="token by token, by kind of cache")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    sizes = options.length, options.heads, options.dim
    date = datetime.datetime.now(datetime.UTC).date()
    print(
        f"{options.implementation}, {jax.devices()[0].device_kind}, JAX {jax.__version__}, {date}"
    )
    print(f"B=1 T={sizes[0]} H={sizes[1]} D={sizes[2]}\n")
    if options.steps:
        print("| maps | cache | o | keys |\n|---|---|---|---|")
        for case, cache in itertools.product(CASES, CACHES):
            found = step_errors(case, cache, options.implementation, *sizes)
            print(f"| {case} | {cache} | {found['o']:.1e} | {found['keys']:.1e} |", flush=True)
        return
    print("| maps | o |", " | ".join(f"d{name}" for name in NAMES), "|")
    print("|---" * (2 + len(NAMES)) + "|")
    for case in CASES:
        found = errors(case, options.implementation, *sizes)
        cells = (f"{found[name]:.1e}" for name in ("o", *NAMES))
        print(f"| {case} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
