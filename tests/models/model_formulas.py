"""NumPy's float64 formulas of jla.models, and inputs."""

import jax
import numpy as np
from comparing import normal

__all__ = ["attention", "language_model", "normal", "numpy_tree", "random_params", "swiglu"]


def numpy_tree(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_params(module, *inputs):
    """Parameters of normal numbers a little over flax's in size; `init` takes long to compile."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    values = [0.3 * normal((3, i), *x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, values)


def attention(layer, params, x):
    """`Attention` of one row without padding, x [T, D]."""
    p, x = numpy_tree(params), np.asarray(x, np.float64)
    q, k, v = (
        np.einsum("td,dhk->htk", x, p[name]["kernel"]) + p[name].get("bias", np.zeros(1))[:, None]
        if "bias" in p[name]
        else np.einsum("td,dhk->htk", x, p[name]["kernel"])
        for name in ("query", "key", "value")
    )
    if layer.rope_theta is not None:
        q, k = rotated(q, layer.rope_theta), rotated(k, layer.rope_theta)
    T, K = q.shape[1:]
    o = np.zeros((T, len(q), v.shape[-1]))
    for head in range(len(q)):
        shared = head // (len(q) // len(k))
        for t in range(T):
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            logits = k[shared, first : t + 1] @ q[head, t] / np.sqrt(K)
            weights = np.exp(logits - logits.max())
            o[t, head] = weights / weights.sum() @ v[shared, first : t + 1]
    return np.einsum("thk,hkd->td", o, p["out"]["kernel"])


def rotated(x, theta):
    """The pairs of features i and i + K/2 as complex numbers, turned."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def swiglu(params, x):
    p = numpy_tree(params)
    gate, up = x @ p["gate"]["kernel"], x @ p["up"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * up) @ p["down"]["kernel"]


def rms_norm(params, x, epsilon):
    root = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)
    return x / root * np.asarray(params["scale"], np.float64)


def language_model(config, params, tokens):
    """The logits of one row, [T, vocabulary], of a model of `Attention` and `SwiGLU`."""
    x = np.asarray(params["embed"]["embedding"], np.float64)[tokens]
    for i, layer in enumerate(config.layers):
        block = params[f"block_{i}"]
        y = rms_norm(block["mixer_norm"], x, config.norm_epsilon)
        x = x + attention(layer.mixer, block["mixer"], y)
        x = x + swiglu(block["mlp"], rms_norm(block["mlp_norm"], x, config.norm_epsilon))
    x = rms_norm(params["final_norm"], x, config.norm_epsilon)
    if config.tied:
        return x @ np.asarray(params["embed"]["embedding"], np.float64).T
    return x @ np.asarray(params["head"]["kernel"], np.float64)
