"""GatedSlotAttention: its cases, its formulas in float64, its parameters, its mistakes."""

import formulas
import numpy as np
from formulas import sigmoid, silu
from layers_table import D, Layer

from jla.linen import GatedSlotAttention

PLAIN = dict(num_heads=2, key_dim=16)
GROUPED = dict(
    num_heads=4,
    key_dim=16,
    num_key_heads=2,
    value_dim=32,
    num_slots=20,
    feature_map="t2r",
    conv_size=4,
    conv_bias=True,
)


def definition(options, p, x):
    """The layer of one sequence x [T, D], token by token.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    conv_size = options.get("conv_size")
    feature_map = {
        "swish": silu,
        "relu": lambda z: np.maximum(z, 0),
        "t2r": lambda z: np.maximum(formulas.project(p, "feature_map", z), 0),
        None: lambda z: z,
    }[options.get("feature_map", "swish")]
    HQ, K = p["q_proj"]["kernel"].shape[1:]
    H, V = p["v_proj"]["kernel"].shape[1:]
    M = p["f_proj"]["kernel"].shape[2]
    scale = options.get("scale", 1.0)
    scale = K**-0.5 if scale is None else scale

    def projected(letter, t):
        if conv_size:
            return formulas.convolved(p, letter, x, t, conv_size)
        return formulas.project(p, f"{letter}_proj", x[t])

    hk, hv, outputs = np.zeros((H, K, M)), np.zeros((H, M, V)), []
    for t in range(len(x)):
        q, k = (feature_map(projected(letter, t)) for letter in "qk")
        v = silu(projected("v", t))
        decay = sigmoid(formulas.project(p, "f_proj", x[t]))
        decay = decay ** (1 / options.get("gate_logit_normalizer", 8))
        for h in range(H):
            hk[h] = hk[h] * decay[h] + np.outer(k[h], 1 - decay[h])
            hv[h] = decay[h][:, None] * hv[h] + np.outer(1 - decay[h], v[h])
        o = np.zeros((HQ, V))
        for j in range(HQ):
            h = j // (HQ // H)
            logits = np.exp(scale * hk[h].T @ q[j])
            o[j] = hv[h].T @ (logits / logits.sum())
        epsilon = options.get("norm_epsilon", 1e-5)
        o = formulas.rms_norm(silu(o), p.get("g_norm", {"scale": 1})["scale"], epsilon, None)
        outputs.append(np.einsum("hv,hvd->d", o, p["o_proj"]["kernel"]))
    cache = {"hk": hk, "hv": hv} | formulas.convolution_cache(p, x, conv_size)
    return np.reshape(outputs, x.shape), cache


GSA = Layer(
    name="gsa",
    module=GatedSlotAttention,
    cases={
        "plain": PLAIN,
        "convolved": PLAIN | dict(conv_size=3, feature_map="relu"),
        "rich": GROUPED,
        "wide": dict(num_heads=1, key_dim=512, num_slots=16, norm_scale=False),
        "bare": PLAIN
        | dict(
            feature_map=None,
            scale=None,
            gate_logit_normalizer=2,
            conv_size=2,
            norm_epsilon=1e-3,
        ),
    },
    definition=definition,
    centre={"scale": 1.0},
    parameters={
        "q_proj": {"kernel": (D, 4, 16)},
        "k_proj": {"kernel": (D, 2, 16)},
        "v_proj": {"kernel": (D, 2, 32)},
        "q_conv1d": {"kernel": (4, 4, 16), "bias": (4, 16)},
        "k_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "v_conv1d": {"kernel": (4, 2, 32), "bias": (2, 32)},
        "f_proj": {"kernel": (D, 2, 20)},
        "feature_map": {"kernel": (16, 16)},
        "g_norm": {"scale": (4, 32)},
        "o_proj": {"kernel": (4, 32, D)},
    },
    cache={
        "hk": (2, 2, 16, 20),
        "hv": (2, 2, 20, 32),
        "q_conv1d": {"inputs": (2, 3, 4, 16)},
        "k_conv1d": {"inputs": (2, 3, 2, 16)},
        "v_conv1d": {"inputs": (2, 3, 2, 32)},
    },
    differentiated=("plain", "bare"),
    padded=("rich", "plain"),
    size_for_kernels=dict(num_slots=64),
    slow=("test_a_prefill_and_another_are_one_forward_pass",),
    mistakes=(
        (
            dict(num_key_heads=4),
            ValueError,
            "num_heads = 2 must be a multiple of num_key_heads = 4",
        ),
        (dict(num_key_heads=0), ValueError, "num_key_heads must be at least 1, got 0"),
        (dict(num_slots=8), ValueError, "num_slots must be 16 to 512, got 8"),
        (dict(num_slots=513), ValueError, "num_slots must be 16 to 512, got 513"),
        (
            dict(feature_map="gelu"),
            ValueError,
            "feature_map must be one of 'swish', 'relu', 't2r', None, got 'gelu'",
        ),
        (
            dict(gate_logit_normalizer=0),
            ValueError,
            "gate_logit_normalizer must be positive, got 0",
        ),
        (dict(gate_logit_normalizer="8"), TypeError, "gate_logit_normalizer must be a Python num"),
        (dict(gate_logit_normalizer=True), TypeError, "gate_logit_normalizer must be a Python num"),
        (dict(scale="1"), TypeError, "scale must be None or a Python number"),
    ),
)
