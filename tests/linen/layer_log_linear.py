"""LogLinearMamba2: its cases, its formulas in float64, its parameters, its mistakes."""

import formulas
import numpy as np
from formulas import silu
from layers_table import D, Layer

from jla.linen import LogLinearMamba2

PLAIN = dict(num_heads=2, key_dim=16, num_levels=7)
GROUPED = dict(num_heads=4, key_dim=16, value_dim=32, num_key_heads=2, num_levels=7)
# What a model may have in place of what most have.
UNCOMMON = dict(skip_per_feature=True, norm_before_gate=True, norm_groups=2, norm_epsilon=1e-3)


def definition(options, p, x):
    """The layer of one sequence x [T, D], token by token, each reading its buckets as the paper
    defines them.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    conv_size, (H, L) = options.get("conv_size", 4), p["L"].shape
    T, (HK, K) = len(x), p["q_proj"]["kernel"].shape[1:]
    V = p["o_proj"]["kernel"].shape[1]

    def softplus(z):
        return np.log1p(np.exp(z))

    z, u, k, q, d, level = (
        formulas.project(p, f"{name}_proj", x) + p[f"{name}_proj"].get("bias", 0)
        for name in ("z", "v", "k", "q", "dt", "level")
    )
    cache = {}
    if conv_size:
        for letter, y in (("q", q), ("k", k), ("v", u)):
            wide = np.concatenate([np.zeros((conv_size - 1, *y.shape[1:])), y])
            cache[f"{letter}_conv1d"] = {"inputs": wide[T:]}
            convolution = p[f"{letter}_conv1d"]
            y[:] = sum(convolution["kernel"][i] * wide[i : i + T] for i in range(conv_size))
            y += convolution.get("bias", 0)
    q, k, u = silu(q), silu(k), silu(u)
    dt = softplus(d + p["dt_bias"])
    v, g = dt[..., None] * u, -np.exp(p["A_log"]) * dt
    scales = softplus(p["L"] * level)

    def bucket(t, level):
        """The positions of a level's bucket at position t, and whether there is one."""
        if level == 0:
            return range(t, t + 1)
        end = (t >> (level - 1)) << (level - 1)
        return range(end - (1 << (level - 1)), end) if t >> (level - 1) & 1 else range(0)

    o = (p["D"] if options.get("skip_per_feature") else p["D"][:, None]) * u
    for t in range(T):
        for h in range(H):
            for level in range(t.bit_length() + 1):
                for s in bucket(t, level):
                    score = q[t, h * HK // H] @ k[s, h * HK // H]
                    decay = np.exp(g[s + 1 : t + 1, h].sum())
                    o[t, h] += scales[t, h, level] * decay * score * v[s, h]
    norm_before_gate = options.get("norm_before_gate", False)
    if not norm_before_gate:
        o *= silu(z)
    if options.get("use_norm", True):
        groups = np.split(np.arange(H), options.get("norm_groups", 1))
        scale, epsilon = p["o_norm"]["scale"], options.get("norm_epsilon", 1e-5)
        normed = [formulas.rms_norm(o[:, g], scale[g], epsilon, (1, 2)) for g in groups]
        o = np.concatenate(normed, axis=1)
    if norm_before_gate:
        o *= silu(z)
    y = np.einsum("thv,hvd->td", o, p["o_proj"]["kernel"]) + p["o_proj"].get("bias", 0)

    levels = np.zeros((H, L, K, V))
    for level in range(1, L):
        for s in bucket(T, level):
            for h in range(H):
                decay = np.exp(g[s + 1 :, h].sum())
                levels[h, level] += decay * np.outer(k[s, h * HK // H], v[s, h])
    return y, cache | {"levels": levels, "position": T}


LOG_LINEAR = Layer(
    name="log_linear",
    module=LogLinearMamba2,
    cases={
        "plain": PLAIN,
        "rich": GROUPED | dict(conv_bias=True),
        "bare": PLAIN | dict(conv_size=None, use_bias=False, use_norm=False),
        "uncommon": GROUPED | UNCOMMON,
    },
    definition=definition,
    # Decays of about exp(-0.05), so that the state reaches far; a token still counts.
    centre={"scale": 1.0, "A_log": -2.0, "dt_bias": -0.5, "D": 1.0, "L": 1.0},
    parameters={
        "q_proj": {"kernel": (D, 2, 16), "bias": (2, 16)},
        "k_proj": {"kernel": (D, 2, 16), "bias": (2, 16)},
        "v_proj": {"kernel": (D, 4, 32), "bias": (4, 32)},
        "z_proj": {"kernel": (D, 4, 32), "bias": (4, 32)},
        "dt_proj": {"kernel": (D, 4), "bias": (4,)},
        "level_proj": {"kernel": (D, 4, 7), "bias": (4, 7)},
        "q_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "k_conv1d": {"kernel": (4, 2, 16), "bias": (2, 16)},
        "v_conv1d": {"kernel": (4, 4, 32), "bias": (4, 32)},
        "A_log": (4,),
        "dt_bias": (4,),
        "D": (4,),
        "L": (4, 7),
        "o_norm": {"scale": (4, 32)},
        "o_proj": {"kernel": (4, 32, D), "bias": (D,)},
    },
    float32_parameters=("A_log", "dt_bias", "D", "L"),
    cache={
        "levels": (2, 4, 7, 16, 32),
        "log_decays": (2, 4, 7),
        "position": (2,),
        "q_conv1d": {"inputs": (2, 3, 2, 16)},
        "k_conv1d": {"inputs": (2, 3, 2, 16)},
        "v_conv1d": {"inputs": (2, 3, 4, 32)},
    },
    cache_dtypes={"position": "int32"},
    defaults={"q_proj": (64, 1, 32), "v_proj": (64, 2, 32), "level_proj": (64, 2, 15)},
    differentiated=("bare",),
    longest=63,  # seven levels hold 2**6 - 1
    slow=("test_a_prefill_and_another_are_one_forward_pass",),
    mistakes=(
        (
            dict(num_key_heads=3),
            ValueError,
            "num_heads = 2 must be a multiple of num_key_heads = 3",
        ),
        (dict(num_key_heads=0), ValueError, "num_key_heads must be at least 1, got 0"),
        (dict(norm_groups=0), ValueError, "norm_groups must be at least 1, got 0"),
        (dict(norm_groups=3), ValueError, "num_heads = 2 must be a multiple of norm_groups = 3"),
        (dict(num_levels=0), ValueError, "num_levels must be at least 1, got 0"),
        (dict(num_levels=7.0), TypeError, "num_levels must be an integer, got 7.0"),
        (dict(num_levels=33), ValueError, "num_levels must be at most 32 .* got 33"),
        (dict(num_levels=3), ValueError, r"at least 4, ceil\(log2 T\) \+ 1, for T = 5 .* got 3"),
    ),
)
