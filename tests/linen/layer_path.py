"""PaTHAttention: its cases, its formulas in float64, its parameters, its mistakes."""

import formulas
import numpy as np
from formulas import sigmoid
from layers_table import CAPACITY, D, Layer

from jla.linen import PaTHAttention

PLAIN = dict(num_heads=2, key_dim=16)
GATED = dict(
    num_heads=4,
    key_dim=16,
    num_key_heads=2,
    value_dim=32,
    use_forget_gate=True,
    use_qk_norm=True,
    w_rank=5,
    conv_size=4,
    conv_bias=True,
)


def definition(options, p, x):
    """The layer of one sequence x [T, D], token by token.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    conv_size = options.get("conv_size", 3)
    HQ, K = p["q_proj"]["kernel"].shape[1:]
    H, V = p["v_proj"]["kernel"].shape[1:]

    def directions(z):
        """W_w z, for any leading axes."""
        if "w_proj" in p:
            return formulas.project(p, "w_proj", z)
        return formulas.project(p, "w_proj_up", formulas.project(p, "w_proj_down", z))

    def normed(name, z):
        if f"{name}_norm" not in p:
            return z
        return formulas.rms_norm(
            z, p[f"{name}_norm"]["scale"], options.get("norm_epsilon", 1e-5), -1
        )

    wide = directions(x)
    keys, values = np.zeros((H, CAPACITY, K)), np.zeros((H, CAPACITY, V))
    decays, outputs = np.zeros((HQ, CAPACITY)), []
    for t in range(len(x)):
        w = wide[t]
        if conv_size:
            kernel = p["w_conv1d"]["kernel"]
            lags = range(min(conv_size, t + 1))
            w = sum(kernel[conv_size - 1 - lag] * wide[t - lag] for lag in lags)
            w = formulas.silu(w + p["w_conv1d"].get("bias", 0))
        w = w / np.sqrt(np.sum(w**2, axis=-1, keepdims=True) + 1e-6)
        q = normed("q", formulas.project(p, "q_proj", x[t]))
        k = normed("k", formulas.project(p, "k_proj", x[t]))
        beta = 2 * sigmoid(formulas.project(p, "b_proj", x[t]) + p["b_proj"]["bias"])
        if options.get("use_forget_gate"):
            gate = formulas.project(p, "g_proj", x[t]) + p["g_proj"]["bias"]
            decays[:, :t] += np.log(sigmoid(gate))[:, None]
        for h in range(H):
            keys[h] = keys[h] @ (np.eye(K) - beta[h] * np.outer(w[h], w[h]))
        keys[:, t], values[:, t] = k, formulas.project(p, "v_proj", x[t])
        o = np.zeros((HQ, V))
        for j in range(HQ):
            h = j // (HQ // H)
            logits = K**-0.5 * (keys[h, : t + 1] @ q[j] + decays[j, : t + 1])
            weights = np.exp(logits - logits.max())
            o[j] = weights @ values[h, : t + 1] / weights.sum()
        outputs.append(np.einsum("hv,hvd->d", o, p["o_proj"]["kernel"]))
    cache = {"key": keys.swapaxes(0, 1), "value": values.swapaxes(0, 1), "length": len(x)}
    if options.get("use_forget_gate"):
        cache["decay"] = decays.T
    if conv_size:
        kept = np.concatenate([np.zeros((conv_size - 1, H, K)), wide])[1 - conv_size :]
        cache["w_conv1d"] = {"inputs": kept}
    return np.reshape(outputs, x.shape), cache


PATH = Layer(
    name="path",
    module=PaTHAttention,
    cases={
        "plain": PLAIN,
        "rich": GATED,
        "bare": PLAIN | dict(use_forget_gate=True, w_rank=None, conv_size=None),
    },
    definition=definition,
    centre={"scale": 1.0},
    parameters={
        "q_proj": {"kernel": (D, 4, 16)},
        "k_proj": {"kernel": (D, 2, 16)},
        "v_proj": {"kernel": (D, 2, 32)},
        "w_proj_down": {"kernel": (D, 5)},
        "w_proj_up": {"kernel": (5, 2, 16)},
        "w_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "b_proj": {"kernel": (D, 2), "bias": (2,)},
        "g_proj": {"kernel": (D, 4), "bias": (4,)},
        "q_norm": {"scale": (16,)},
        "k_norm": {"scale": (16,)},
        "o_proj": {"kernel": (4, 32, D)},
    },
    cache={
        "key": (2, 3, 2, 16),
        "value": (2, 3, 2, 32),
        "decay": (2, 3, 4),
        "length": (2,),
        "w_conv1d": {"inputs": (2, 3, 2, 16)},
    },
    cache_dtypes={"value": "bfloat16", "length": "int32"},
    differentiated=("bare",),
    longest=CAPACITY,
    slow=("test_a_prefill_and_another_are_one_forward_pass",),
    mistakes=(
        (
            dict(num_key_heads=4),
            ValueError,
            "num_heads = 2 must be a multiple of num_key_heads = 4",
        ),
        (dict(num_key_heads=0), ValueError, "num_key_heads must be at least 1, got 0"),
        (dict(w_rank=0), ValueError, "w_rank must be at least 1, got 0; None is for full rank"),
        (dict(w_rank=1.5), TypeError, "w_rank must be an integer, got 1.5"),
    ),
)
