"""KimiDeltaAttention: its cases, its formulas in float64, its parameters, its mistakes."""

import formulas
import numpy as np
from formulas import sigmoid, silu
from layers_table import D, Layer

from jla.linen import KimiDeltaAttention

PLAIN = dict(num_heads=2, key_dim=16)
GROUPED = dict(
    num_heads=4,
    key_dim=16,
    num_key_heads=2,
    value_dim=32,
    allow_negative_eigenvalues=True,
    gate_rank=5,
    conv_bias=True,
)


def definition(options, p, x):
    """The layer of one sequence x [T, D], token by token.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    conv_size = options.get("conv_size", 4)
    lower_bound = options.get("gate_lower_bound")
    HV, V = p["v_proj"]["kernel"].shape[1:]
    H, K = p["q_proj"]["kernel"].shape[1:]

    def project(name, z):
        return formulas.project(p, name, z)

    def low_rank(name, z):
        if name in p:
            return project(name, z)
        return project(f"{name}_up", project(f"{name}_down", z))

    def activated(letter, t):
        if conv_size:
            return formulas.convolved(p, letter, x, t, conv_size)
        return silu(project(f"{letter}_proj", x[t]))

    def normalised(z):
        return z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)

    state, outputs = np.zeros((HV, K, V)), []
    for t in range(len(x)):
        q, k, v = normalised(activated("q", t)), normalised(activated("k", t)), activated("v", t)
        f = low_rank("f_proj", x[t]) + p["dt_bias"]
        rate = np.exp(p["A_log"])[:, None]
        g = -rate * np.log1p(np.exp(f)) if lower_bound is None else lower_bound * sigmoid(rate * f)
        beta = sigmoid(project("b_proj", x[t]))
        beta = beta * (2 if options.get("allow_negative_eigenvalues") else 1)
        o = np.zeros((HV, V))
        for j in range(HV):
            h = j // (HV // H)
            state[j] = np.exp(g[j])[:, None] * state[j]
            state[j] += beta[j] * np.outer(k[h], v[j] - state[j].T @ k[h])
            o[j] = K**-0.5 * state[j].T @ q[h]
        o = formulas.rms_norm(o, p["o_norm"]["scale"], options.get("norm_epsilon", 1e-5), -1)
        gate = low_rank("g_proj", x[t])
        if options.get("output_gate_bias", True):
            gate = gate + p["g_proj" if "g_proj" in p else "g_proj_up"]["bias"]
        outputs.append(np.einsum("hv,hvd->d", o * sigmoid(gate), p["o_proj"]["kernel"]))
    cache = {"recurrent_state": state} | formulas.convolution_cache(p, x, conv_size)
    return np.reshape(outputs, x.shape), cache


KDA = Layer(
    name="kda",
    module=KimiDeltaAttention,
    cases={
        "plain": PLAIN,
        "rich": GROUPED,
        "bounded": PLAIN
        | dict(
            gate_lower_bound=-5.0,
            conv_size=2,
            norm_epsilon=1e-3,
            full_rank_gate=True,
            gate_rank=5,
        ),
        "no_convolution": GROUPED
        | dict(
            conv_size=None,
            conv_bias=False,
            gate_rank=None,
            full_rank_decay=True,
            output_gate_bias=False,
        ),
    },
    definition=definition,
    # Decays of about exp(-0.05), so that the state reaches far.
    centre={"dt_bias": -3.0, "scale": 1.0},
    parameters={
        "q_proj": {"kernel": (D, 2, 16)},
        "k_proj": {"kernel": (D, 2, 16)},
        "v_proj": {"kernel": (D, 4, 32)},
        "q_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "k_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "v_conv1d": {"kernel": (4, 4, 32), "bias": (4, 32)},
        "f_proj_down": {"kernel": (D, 5)},
        "f_proj_up": {"kernel": (5, 4, 16)},
        "A_log": (4,),
        "dt_bias": (4, 16),
        "b_proj": {"kernel": (D, 4)},
        "g_proj_down": {"kernel": (D, 5)},
        "g_proj_up": {"kernel": (5, 4, 32), "bias": (4, 32)},
        "o_norm": {"scale": (32,)},
        "o_proj": {"kernel": (4, 32, D)},
    },
    float32_parameters=("A_log", "dt_bias"),
    cache={
        "recurrent_state": (2, 4, 16, 32),
        "q_conv1d": {"inputs": (2, 3, 2, 16)},
        "k_conv1d": {"inputs": (2, 3, 2, 16)},
        "v_conv1d": {"inputs": (2, 3, 4, 32)},
    },
    differentiated=("bounded", "no_convolution"),
    padded=("rich", "no_convolution"),
    slow=("test_a_prefill_and_another_are_one_forward_pass",),
    mistakes=(
        (
            dict(num_key_heads=3),
            ValueError,
            "num_heads = 2 must be a multiple of num_key_heads = 3",
        ),
        (dict(num_key_heads=0), ValueError, "num_key_heads must be at least 1, got 0"),
        (dict(gate_lower_bound=5.0), ValueError, "lower_bound must be negative, got 5.0"),
        (dict(gate_rank=0), ValueError, "gate_rank must be at least 1, got 0; None is for value"),
        (
            dict(gate_rank=8, full_rank_decay=True, full_rank_gate=True),
            ValueError,
            "gate_rank is 8, but with full_rank_decay and full_rank_gate no projection has a rank",
        ),
    ),
)
