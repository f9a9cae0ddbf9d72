"""How near conjugate gradients come to the exact solution: the table in docs/mesa_net.md.

Every row is one kind of keys, gates, betas and ridge. For the worst token: the condition of
I + L^-1/2 Hkk L^-1/2, L = Diag(lamb), which conjugate gradients work with, and the residual
|q - (Hkk + L) x| / |q| that `mesa_step` leaves. For all tokens together: the relative error of
`mesa_net`'s o, at several `cg_steps`, and of the gradients at 30 (the worst argument's), against
exact solutions in float64; beside them the same two errors of "reference", which solves exactly in
float32.

    JAX_PLATFORMS=cpu python -m benchmarks.mesa_convergence
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jla
from cases import unit

T, H, K = 512, 2, 64
STEPS = (5, 10, 20, 30, 60)
f32 = jnp.float32


def keys(random, kind):
    """[T, H, K], of norm 1."""
    k = unit(random.standard_normal((T, H, K)))
    if kind == "near one direction":
        k = unit(k[:1] + 0.3 * k)
    elif kind == "channels unlike":
        k = unit(k * np.exp(1.5 * random.standard_normal(K)))
    elif kind == "8 that repeat":
        k = k[np.arange(T) % 8]
    elif kind == "one that repeats":
        k = np.broadcast_to(k[:1], k.shape)
    return k


def inputs(kind, decay, beta, ridge):
    """Gates of about `decay`, betas up to `beta`, lamb of about `ridge`; and a cotangent of o."""
    random = np.random.default_rng(0)
    uniform = random.uniform
    return dict(
        q=unit(random.standard_normal((T, H, K))),
        k=keys(random, kind),
        v=random.standard_normal((T, H, K)),
        g=decay * uniform(0.5, 1.5, (T, H)),
        beta=beta * uniform(0.5, 1.0, (T, H)),
        lamb=ridge * uniform(0.5, 1.5, (H, K)),
    ), random.standard_normal((T, H, K))


def exact(x, cotangent):
    """In float64: o, the gradients of sum(o * cotangent), every token's Hkk."""
    kk, kv = np.zeros((2, H, K, K))
    solved, adjoint, states, values = [], [], [], []
    ridge = x["lamb"][:, :, None] * np.eye(K)
    tokens = [x[n] for n in ("q", "k", "v", "g", "beta")]
    for q, k, v, g, beta, c in zip(*tokens, cotangent, strict=True):
        kk = np.exp(g)[:, None, None] * kk + beta[:, None, None] * k[:, :, None] * k[:, None]
        kv = np.exp(g)[:, None, None] * kv + beta[:, None, None] * k[:, :, None] * v[:, None]
        both = np.stack([q, np.einsum("hkv,hv->hk", kv, c)], axis=-1)
        both = np.linalg.solve(kk + ridge, both)
        solved.append(both[..., 0])
        adjoint.append(both[..., 1])
        states.append(kk)
        values.append(kv)
    a, y = np.stack(solved), np.stack(adjoint)
    o = np.einsum("thkv,thk->thv", values, a)
    gradients = dict(q=y, lamb=-np.sum(a * y, axis=0))
    d_kk, d_kv = np.zeros((2, H, K, K))
    names = ("k", "v", "g", "beta")
    gradients |= {n: np.zeros_like(x[n]) for n in names}
    for t in reversed(range(T)):
        d_kk = d_kk - y[t][:, :, None] * a[t][:, None]
        d_kv = d_kv + a[t][:, :, None] * cotangent[t][:, None]
        k, v, beta = x["k"][t], x["v"][t], x["beta"][t][:, None]
        to_k = np.einsum("hkl,hl->hk", d_kk, k)
        from_v = np.einsum("hkv,hv->hk", d_kv, v)
        symmetric = to_k + np.einsum("hlk,hl->hk", d_kk, k)
        gradients["k"][t] = beta * (symmetric + from_v)
        gradients["v"][t] = beta * np.einsum("hkv,hk->hv", d_kv, k)
        gradients["beta"][t] = np.sum(k * (to_k + from_v), axis=-1)
        decay = np.exp(x["g"][t])[:, None, None]
        d_kk, d_kv = decay * d_kk, decay * d_kv
        if t:
            gradients["g"][t] = np.sum(d_kk * states[t - 1] + d_kv * values[t - 1], axis=(1, 2))
    return o, gradients, np.stack(states)


@functools.partial(jax.jit, static_argnames=("steps", "implementation"))
def forward(x, steps, implementation="xla"):
    x = {name: array if name == "lamb" else array[None] for name, array in x.items()}
    return jla.mesa_net(**x, cg_steps=steps, implementation=implementation)[0][0]


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(x, cotangent, implementation):
    o, pull = jax.vjp(lambda x: forward(x, 30, implementation), x)
    return o, pull(cotangent)[0]


@jax.jit
def solutions(q, lamb, kk):
    """x of every token: with Hkv the identity, one step's output is it."""
    identity = jnp.broadcast_to(jnp.eye(K), kk.shape)
    nothing = jnp.zeros(q.shape[:2])
    state = jla.MesaState(kk, identity)
    zeros = jnp.zeros_like(q)
    return jla.mesa_step(q, zeros, zeros, nothing, nothing, lamb, state, implementation="xla")[0]


def error(got, want):
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)


def row(dtype, kind, decay, beta, ridge):
    x, cotangent = inputs(kind, decay, beta, ridge)
    half = {n: jnp.asarray(a, dtype if n in "qkv" else f32) for n, a in x.items()}
    cotangent = jnp.asarray(cotangent, dtype)
    x = {n: np.float64(a) for n, a in half.items()}
    o, want, kk = exact(x, np.float64(cotangent))
    matrix = kk + x["lamb"][:, :, None] * np.eye(K)
    root = np.sqrt(x["lamb"])
    condition = np.linalg.cond(matrix / root[:, :, None] / root[:, None, :]).max()
    a = np.float64(solutions(half["q"].astype(f32), half["lamb"], jnp.asarray(kk, f32)))
    residual = x["q"] - np.einsum("thkl,thl->thk", matrix, a)
    residual = (np.linalg.norm(residual, axis=-1) / np.linalg.norm(x["q"], axis=-1)).max()
    numbers = [error(forward(half, steps), o) for steps in STEPS]
    for implementation in ("xla", "reference"):
        got, found = gradients(half, cotangent, implementation)
        worst = max(error(found[n], want[n]) for n in want)
        numbers += [worst] if implementation == "xla" else [error(got, o), worst]
    return [condition, residual, *numbers]


def main():
    print(f"T={T} H={H} K=V={K}, {jax.devices()[0].device_kind}, JAX {jax.__version__}\n")
    columns = ["inputs", "keys", "g", "beta", "lamb", "condition", "residual at 30"]
    columns += [f"o at {steps}" for steps in STEPS] + ["gradients at 30"]
    columns += ["reference: o", "gradients"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    cases = [
        ("random", 0.0, 1.0, 1.0),
        ("random", -0.02, 1.0, 0.75),
        ("random", -0.02, 1.0, 0.01),
        ("random", -1.0, 1.0, 0.01),
        ("random", 0.0, 1.0, 0.01),
        ("random", 0.0, 0.01, 0.01),
        ("near one direction", -0.02, 1.0, 0.75),
        ("near one direction", 0.0, 1.0, 0.01),
        ("channels unlike", -0.02, 1.0, 0.75),
        ("channels unlike", 0.0, 1.0, 0.01),
        ("8 that repeat", -0.02, 1.0, 0.75),
        ("8 that repeat", 0.0, 1.0, 0.01),
        ("one that repeats", 0.0, 1.0, 1.0),
        ("one that repeats", 0.0, 1.0, 0.01),
    ]
    for dtype in (f32, jnp.bfloat16, jnp.float16):
        chosen = cases if dtype == f32 else [cases[1], cases[2], cases[11]]
        for case in chosen:
            cells = [jnp.dtype(dtype).name, *(f"{c:g}" if c != case[0] else c for c in case)]
            condition, *numbers = row(dtype, *case)
            cells += [f"{condition:.3g}", *(f"{number:.0e}" for number in numbers)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
