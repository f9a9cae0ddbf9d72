"""What the layers' float64 definitions have in common."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def project(p, name, z):
    return np.tensordot(z, p[name]["kernel"], axes=1)


def convolved(p, letter, x, t, conv_size):
    """Token t of q, k or v after the convolution and SiLU."""
    kernel, bias = p[f"{letter}_conv1d"]["kernel"], p[f"{letter}_conv1d"].get("bias", 0)
    lags = range(min(conv_size, t + 1))
    past = (kernel[conv_size - 1 - lag] * project(p, f"{letter}_proj", x[t - lag]) for lag in lags)
    return silu(sum(past) + bias)


def convolution_cache(p, x, conv_size):
    """What the convolutions' caches hold after x [T, D]."""
    cache = {}
    for letter in "qkv":
        if f"{letter}_conv1d" not in p:
            continue
        z = project(p, f"{letter}_proj", x)
        before = np.zeros((conv_size - 1, *z.shape[1:]))
        kept = np.concatenate([before, z])[1 - conv_size :]
        cache[f"{letter}_conv1d"] = {"inputs": kept}
    return cache


def rms_norm(z, scale, epsilon, axes):
    return z / np.sqrt(np.mean(z**2, axis=axes, keepdims=True) + epsilon) * scale
