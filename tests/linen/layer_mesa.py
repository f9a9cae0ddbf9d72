"""MesaNet: its cases, its formulas in float64, its parameters, its mistakes."""

import formulas
import numpy as np
from formulas import sigmoid, silu
from layers_table import D, Layer

from jla.linen import MesaNet

PLAIN = dict(num_heads=2, key_dim=16)
GATED = dict(num_heads=2, key_dim=16, value_dim=32, use_output_gate=True, conv_bias=True)


def definition(options, p, x):
    """The layer of one sequence x [T, D], token by token.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    conv_size = options.get("conv_size", 4)
    H, V = p["v_proj"]["kernel"].shape[1:]
    K = p["q_proj"]["kernel"].shape[2]
    lamb = np.log1p(np.exp(p["lambda_params"])) + options.get("lambda_lower_bound", 0.25)

    def activated(letter, t):
        if conv_size:
            return formulas.convolved(p, letter, x, t, conv_size)
        return silu(formulas.project(p, f"{letter}_proj", x[t]))

    def normalised(z):
        return z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)

    def gate(name, z):
        return sigmoid(formulas.project(p, name, z) + p[name]["bias"])

    kk, kv, outputs = np.zeros((H, K, K)), np.zeros((H, K, V)), []
    for t in range(len(x)):
        q, k = normalised(activated("q", t)), normalised(activated("k", t))
        v = formulas.project(p, "v_proj", x[t])
        decay, beta = gate("a_proj", x[t]), gate("b_proj", x[t])
        o = np.zeros((H, V))
        for h in range(H):
            kk[h] = decay[h] * kk[h] + beta[h] * np.outer(k[h], k[h])
            kv[h] = decay[h] * kv[h] + beta[h] * np.outer(k[h], v[h])
            o[h] = kv[h].T @ np.linalg.solve(kk[h] + np.diag(lamb[h]), q[h])
        o = formulas.rms_norm(o, p["o_norm"]["scale"], options.get("norm_epsilon", 1e-5), -1)
        if options.get("use_output_gate"):
            o = o * silu(formulas.project(p, "g_proj", x[t]))
        outputs.append(np.einsum("hv,hvd->d", o, p["o_proj"]["kernel"]))
    cache = {"kk": kk, "kv": kv} | formulas.convolution_cache(p, x, conv_size)
    return np.reshape(outputs, x.shape), cache


MESA = Layer(
    name="mesa",
    module=MesaNet,
    cases={
        "plain": PLAIN,
        "rich": GATED,
        "bare": PLAIN | dict(conv_size=None, lambda_lower_bound=0.05, norm_epsilon=1e-3),
    },
    definition=definition,
    centre={"scale": 1.0},
    parameters={
        "q_proj": {"kernel": (D, 2, 16)},
        "k_proj": {"kernel": (D, 2, 16)},
        "v_proj": {"kernel": (D, 2, 32)},
        "q_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "k_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "a_proj": {"kernel": (D, 2), "bias": (2,)},
        "b_proj": {"kernel": (D, 2), "bias": (2,)},
        "lambda_params": (2, 16),
        "g_proj": {"kernel": (D, 2, 32)},
        "o_norm": {"scale": (32,)},
        "o_proj": {"kernel": (2, 32, D)},
    },
    float32_parameters=("lambda_params",),
    cache={
        "kk": (2, 2, 16, 16),
        "kv": (2, 2, 16, 32),
        "q_conv1d": {"inputs": (2, 3, 2, 16)},
        "k_conv1d": {"inputs": (2, 3, 2, 16)},
    },
    differentiated=("bare",),
    mistakes=(
        (dict(cg_steps=0), ValueError, "cg_steps must be at least 1, got 0"),
        (dict(cg_steps=1.5), TypeError, "cg_steps must be a Python integer"),
        (dict(cg_steps_decode=0), ValueError, "cg_steps_decode must be at least 1, got 0"),
        (dict(lambda_lower_bound=0), ValueError, "lambda_lower_bound must be positive, got 0"),
        (dict(lambda_lower_bound="1"), TypeError, "lambda_lower_bound must be a Python number"),
    ),
)
