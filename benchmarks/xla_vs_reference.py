"""Times KDA's forward and backward pass, "xla" against "reference", on this machine.

The two take turns, so that other work on the machine slows both. Of each, several medians are taken
and the fastest is printed.

    python -m benchmarks.xla_vs_reference
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import cases.kda
import jla
from cases import numpy_normal

B, T, H, K, V = 1, 2048, 4, 64, 64
ROUNDS, REPEATS = 15, 5


def make_inputs():
    normal = numpy_normal(np.random.default_rng(0))
    sizes = dict(B=B, T=T, H=H, HV=H, K=K, V=V)
    inputs = cases.kda.arguments(sizes, normal, np.float32)
    del inputs["initial_state"]
    return jax.tree.map(jnp.asarray, (inputs, normal(B, T, H, V)))


def compiled(implementation, inputs, cotangent):
    """The gradient of sum(output * cotangent) in all inputs, compiled."""

    def loss(inputs):
        o, _ = jla.kda(**inputs, implementation=implementation)
        return jnp.sum(o * cotangent)

    return jax.jit(jax.value_and_grad(loss)).lower(inputs).compile()


def median_seconds(run, inputs):
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main():
    inputs, cotangent = make_inputs()
    runs = {name: compiled(name, inputs, cotangent) for name in ("reference", "xla")}
    for run in runs.values():
        jax.block_until_ready(run(inputs))
    medians = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            medians[name].append(median_seconds(run, inputs))
    print(f"kda forward + backward, B={B} T={T} H={H} K={K} V={V} float32, {jax.devices()[0]}")
    for name, values in medians.items():
        print(
            f"{name:10s} {1e3 * min(values):8.1f} ms   (fastest of {ROUNDS} medians of {REPEATS})"
        )
    print(f"{'ratio':10s} {min(medians['reference']) / min(medians['xla']):8.1f}")


if __name__ == "__main__":
    main()
