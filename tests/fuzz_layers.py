"""The fuzzer's calls of the flax layers: masks, segments and decoding, against the float64
definitions of the layers' own tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_draw import TABLE, Content, Shape, chance, draw_ids, draw_length, generator, one_of
from layers import LAYERS, D, empty_cache, layer, numpy_layer, padding, parameters
from layers_table import CAPACITY

# In the mechanisms' place, for the layers.
NAMES = {f"{name}_layer": name for name in LAYERS}
# The layers' tests allow this in 16 bits, for projections and norms round too.
TOLERANCE = 3e-2


def tolerances(shape):
    if shape.dtype != "float32":
        return (TOLERANCE, TOLERANCE)
    return TABLE[NAMES[shape.mechanism]].tolerances["float32"]


def draw_layer(name, implementation, seed, index):
    """A shape; its check is "whole", with segments, or "decode", a prefill and single tokens."""
    rng = generator("layer", name, implementation, seed, index)
    entry = LAYERS[NAMES[name]]
    T = draw_length(rng, entry.longest or 150)
    check = "whole" if T == 1 else one_of(rng, ("whole", "decode"))
    at = max(1, T - int(rng.integers(1, 6))) if check == "decode" else 0
    options = dict(case=one_of(rng, entry.cases))
    segments = "int32" if check == "whole" and chance(rng, 0.7) else None
    low = implementation == "pallas" or (implementation in ("xla", "triton") and chance(rng, 0.4))
    dtype = "bfloat16" if low else "float32"
    sizes = dict(B=int(rng.integers(1, 4)), T=T)
    return Shape(name, implementation, dtype, sizes, check, at, (), segments, (), options)


def draw_layer_content(*words):
    return Content(int(generator("layer content", *words).integers(2**31)))


@functools.lru_cache(maxsize=2)
def _program(case, implementation, dtype, decode):
    dtype = None if dtype == "float32" else jnp.dtype(dtype)
    module = layer(case, implementation=implementation, dtype=dtype, decode=decode)

    @jax.jit
    def program(params, cache, x, mask, ids):
        if not decode:
            return module.apply({"params": params}, x, mask=mask, segment_ids=ids), None
        variables = {"params": params, "cache": cache}
        y, variables = module.apply(variables, x, mask=mask, segment_ids=ids, mutable=["cache"])
        return y, variables["cache"]

    return program


def inputs(shape, content):
    """x [B, T, D], with NaN where it is masked, the mask, and segment_ids or None."""
    B, T = shape.sizes["B"], shape.sizes["T"]
    rng = generator("layer inputs", content.seed)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    lengths = [one_of(rng, (T, int(rng.integers(0, T + 1)))) for _ in range(B)]
    mask = np.asarray(padding(one_of(rng, ("left", "right", "scattered")), lengths, T))
    ids = draw_ids(rng, B, T, shape.segments, ()) if shape.segments else None
    return np.where(mask[..., None], x, np.nan), mask, ids


def run(shape, x, mask, ids):
    """What the layer under test returns: the output, and in decoding the last cache."""
    case, at = _case(shape), shape.at
    B, T = shape.sizes["B"], shape.sizes["T"]
    program = _program(case, shape.implementation, shape.dtype, shape.check == "decode")
    if shape.check == "whole":
        return (program(parameters(case), None, x, mask, ids)[0],)
    cache, outputs = empty_cache(case, B), []
    if shape.dtype != "float32":
        like = layer(case, dtype=jnp.dtype(shape.dtype), decode=True)
        room = jnp.zeros((B, CAPACITY, D))
        made = jax.eval_shape(like.init, jax.random.key(0), room)["cache"]
        cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made)
    for start, stop in [(0, at), *((t, t + 1) for t in range(at, T))]:
        y, cache = program(parameters(case), cache, x[:, start:stop], mask[:, start:stop], None)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), cache


def definition(shape, x, mask, ids):
    """What `run` should return."""
    want, caches = np.zeros(x.shape), []
    for row in range(len(x)):
        real = np.flatnonzero(mask[row])
        borders = [] if ids is None else 1 + np.flatnonzero(np.diff(ids[row, real].astype(int)))
        for piece in np.split(real, borders):
            want[row, piece], cache = numpy_layer(_case(shape), x[row, piece])
        caches.append(cache)
    if shape.check == "whole":
        return (want,)
    return want, jax.tree.map(lambda *rows: np.stack(rows), *caches)


def _case(shape):
    return f"{NAMES[shape.mechanism]}-{shape.options['case']}"
