"""jla.linen.KimiDeltaAttention: its mathematics, its cache, its masks and its manners."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jla.linen import KimiDeltaAttention

D = 24
PLAIN = dict(num_heads=2, head_dim=16)
GROUPED = dict(
    num_heads=2,
    head_dim=16,
    num_value_heads=4,
    value_head_dim=32,
    allow_negative_eigenvalues=True,
)
CASES = {
    "plain": PLAIN,
    "grouped_negative": GROUPED,
    "bounded": PLAIN | dict(gate_lower_bound=-5.0, conv_size=2, norm_epsilon=1e-3),
    "no_convolution": GROUPED | dict(conv_size=None),
}
each_case = pytest.mark.parametrize("case", CASES)


def layer(options=PLAIN, **more):
    """The layer on "reference", the definition, which also compiles fastest."""
    defaults = dict(implementation="reference", precision="highest")
    return KimiDeltaAttention(**defaults | options | more)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def init_shapes(case, B):
    """What init makes, as shapes: most tests need no initial values, which take long to compile."""
    module = layer(CASES[case], decode=True)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((B, 3, D)))


@functools.cache
def parameters(case):
    """Random parameters of a case; decays of about exp(-0.05), so that the state reaches far."""
    centre = {"dt_bias": -3.0, "scale": 1.0}
    leaves, tree = jax.tree.flatten_with_path(init_shapes(case, 1)["params"])
    values = [
        centre.get(path[-1].key, 0.0) + 0.2 * normal(10 + i, *leaf.shape)
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, values)


def close(actual, expected, tolerance=1e-4):
    """Relative Frobenius error."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected)
    assert error <= tolerance * np.linalg.norm(expected), error / np.linalg.norm(expected)


def trees_close(actual, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: close(a, b, tolerance), actual, expected)


@functools.partial(jax.jit, static_argnames="options")
def forward(options, params, x, mask=None, segment_ids=None):
    return layer(dict(options)).apply({"params": params}, x, mask=mask, segment_ids=segment_ids)


@functools.partial(jax.jit, static_argnames="options")
def advance(options, params, cache, x, mask=None, segment_ids=None):
    """One decoding call: the output and the advanced cache."""
    y, variables = layer(dict(options), decode=True).apply(
        {"params": params, "cache": cache},
        x,
        mask=mask,
        segment_ids=segment_ids,
        mutable=["cache"],
    )
    return y, variables["cache"]


def hashable(case):
    return tuple(CASES[case].items())


def empty_cache(case, B):
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    return zeros(init_shapes(case, B)["cache"])


def numpy_layer(case, x):
    """The layer of one sequence [T, D], token by token in float64.

    Returns the output [T, D] and what the cache should hold, without the batch axis.
    """
    options, params = CASES[case], parameters(case)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    conv_size = options.get("conv_size", 4)
    lower_bound = options.get("gate_lower_bound")
    HV, V = p["v_proj"]["kernel"].shape[1:]
    H, K = p["q_proj"]["kernel"].shape[1:]

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def project(name, z):
        return np.tensordot(z, p[name]["kernel"], axes=1)

    def activated(letter, t):
        """Token t of q, k or v after the convolution and SiLU."""
        if not conv_size:
            z = project(f"{letter}_proj", x[t])
        else:
            kernel = p[f"{letter}_conv1d"]["kernel"]
            z = sum(
                kernel[conv_size - 1 - lag] * project(f"{letter}_proj", x[t - lag])
                for lag in range(min(conv_size, t + 1))
            )
        return z * sigmoid(z)

    def normalised(z):
        return z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)

    state, outputs = np.zeros((HV, K, V)), []
    for t in range(len(x)):
        q, k, v = normalised(activated("q", t)), normalised(activated("k", t)), activated("v", t)
        f = project("f_proj_up", project("f_proj_down", x[t])) + p["dt_bias"]
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
        epsilon = options.get("norm_epsilon", 1e-5)
        o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + epsilon) * p["o_norm"]["scale"]
        gate = project("g_proj_up", project("g_proj_down", x[t])) + p["g_proj_up"]["bias"]
        outputs.append(np.einsum("hv,hvd->d", o * sigmoid(gate), p["o_proj"]["kernel"]))
    cache = {"recurrent_state": state}
    for letter in "qkv" if conv_size else ():
        z = project(f"{letter}_proj", x)
        past = conv_size - 1
        before = np.zeros((past, *z.shape[1:]))
        cache[f"{letter}_conv1d"] = {"inputs": np.concatenate([before, z])[-past:]}
    return np.reshape(outputs, x.shape), cache


def row_of(tree, row):
    return jax.tree.map(lambda a: a[row], tree)


@each_case
def test_formulas(case):
    x = normal(2, 2, 37, D)
    y = forward(hashable(case), parameters(case), x)
    for row in range(2):
        close(y[row], numpy_layer(case, x[row])[0])


def test_implementations_agree():
    """Chunks, one token, padding, segments and a cache in the chunkwise implementation too."""
    case, cache, other = "grouped_negative", *[empty_cache("grouped_negative", 2)] * 2
    xla = (*hashable(case), ("implementation", "xla"))
    ids = jnp.concatenate([IDS, IDS], axis=1)
    x, mask = normal(2, 2, 26, D), padding("scattered", (26, 19), 26)
    for part in (slice(0, 25), slice(25, 26)):
        arguments = dict(x=x[:, part], mask=mask[:, part], segment_ids=ids[:, part])
        y, cache = advance(hashable(case), parameters(case), cache, **arguments)
        z, other = advance(xla, parameters(case), other, **arguments)
        close(z, y)
        trees_close(other, cache)


# The parameters.


def test_parameter_tree():
    params = init_shapes("grouped_negative", 1)["params"]
    expected = {
        "q_proj": {"kernel": (D, 2, 16)},
        "k_proj": {"kernel": (D, 2, 16)},
        "v_proj": {"kernel": (D, 4, 32)},
        "q_conv1d": {"kernel": (4, 2, 16)},
        "k_conv1d": {"kernel": (4, 2, 16)},
        "v_conv1d": {"kernel": (4, 4, 32)},
        "f_proj_down": {"kernel": (D, 32)},
        "f_proj_up": {"kernel": (32, 4, 16)},
        "A_log": (4,),
        "dt_bias": (4, 16),
        "b_proj": {"kernel": (D, 4)},
        "g_proj_down": {"kernel": (D, 32)},
        "g_proj_up": {"kernel": (32, 4, 32), "bias": (4, 32)},
        "o_norm": {"scale": (32,)},
        "o_proj": {"kernel": (4, 32, D)},
    }
    assert jax.tree.map(jnp.shape, params) == expected
    chex.assert_type(jax.tree.leaves(params), jnp.float32)


def test_defaults_come_from_the_input():
    module = KimiDeltaAttention(num_heads=2)
    params = jax.eval_shape(module.init, jax.random.key(0), normal(0, 1, 4, 64))["params"]
    chex.assert_shape([params["q_proj"]["kernel"], params["v_proj"]["kernel"]], (64, 2, 32))
    chex.assert_shape(params["o_proj"]["kernel"], (2, 32, 64))


def test_no_convolution_has_no_convolution():
    for conv_size in (None, 0):
        module = layer(conv_size=conv_size, decode=True)
        variables = jax.eval_shape(module.init, jax.random.key(0), normal(0, 1, 4, D))
        assert not [name for name in variables["params"] if "conv" in name]
        assert list(variables["cache"]) == ["recurrent_state"]


def test_initial_values():
    # The projections' kernels are flax's own matter, and slow to compile.
    wide = dict(num_heads=64, head_dim=16, kernel_init=nn.initializers.zeros)
    params = layer(wide).init(jax.random.key(0), normal(0, 1, 4, D))["params"]
    rate, dt = np.exp(params["A_log"]), np.asarray(nn.softplus(params["dt_bias"]))
    assert rate.min() >= 1 and rate.max() <= 16 and 7 < rate.mean() < 10
    assert dt.min() >= 0.999e-3 and dt.max() <= 1.001e-1
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2
    kernel = np.asarray(params["q_conv1d"]["kernel"])
    assert np.abs(kernel).max() <= 0.5 and abs(kernel.std() - 0.5 / np.sqrt(3)) < 0.01
    assert np.all(np.asarray(params["o_norm"]["scale"]) == 1)
    assert not np.any(params["g_proj_up"]["bias"])
    bounded = layer(wide, gate_lower_bound=-5.0).init(jax.random.key(0), normal(0, 1, 4, D))
    assert not np.any(bounded["params"]["A_log"])


def test_kernel_init_reaches_every_projection():
    params = layer(kernel_init=nn.initializers.constant(0.25)).init(
        jax.random.key(0), normal(0, 1, 4, D)
    )["params"]
    kernels = {name: p["kernel"] for name, p in params.items() if "_proj" in name}
    assert len(kernels) == 9
    for kernel in kernels.values():
        assert np.all(np.asarray(kernel) == 0.25)


# Dtypes.


def test_bfloat16():
    x, params = normal(2, 2, 37, D), parameters("grouped_negative")
    exact = forward(hashable("grouped_negative"), params, x)
    module = layer(GROUPED, dtype=jnp.bfloat16, decode=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    chex.assert_type(jax.tree.leaves(variables["params"]), jnp.float32)
    chex.assert_type(variables["cache"]["recurrent_state"], jnp.float32)
    chex.assert_type(variables["cache"]["q_conv1d"]["inputs"], jnp.bfloat16)
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["cache"])
    y, mutated = module.apply({"params": params, "cache": cache}, x, mutable=["cache"])
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(mutated["cache"], variables["cache"])
    close(y, exact, 3e-2)


def test_param_dtype_spares_the_gates_parameters():
    module, x = layer(param_dtype=jnp.bfloat16), normal(0, 1, 4, D).astype(jnp.bfloat16)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = dict(variables["params"])
    chex.assert_type([params.pop("A_log"), params.pop("dt_bias")], jnp.float32)
    chex.assert_type(jax.tree.leaves(params), jnp.bfloat16)
    chex.assert_type(jax.eval_shape(module.apply, variables, x), jnp.bfloat16)


# Decoding.


def test_init_makes_an_empty_cache():
    module = layer(GROUPED, decode=True, kernel_init=nn.initializers.constant(0.1))
    cache = module.init(jax.random.key(0), normal(0, 2, 3, D))["cache"]
    expected = {
        "recurrent_state": (2, 4, 16, 32),
        "q_conv1d": {"inputs": (2, 3, 2, 16)},
        "k_conv1d": {"inputs": (2, 3, 2, 16)},
        "v_conv1d": {"inputs": (2, 3, 4, 32)},
    }
    assert jax.tree.map(jnp.shape, cache) == expected
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))


@each_case
def test_prefill_in_chunks_then_tokens_is_one_forward(case):
    x, params = normal(3, 2, 19, D), parameters(case)
    cache, outputs, start = empty_cache(case, 2), [], 0
    for length in (2, 9, 2, 1, 1, 1, 1, 1, 1):
        y, cache = advance(hashable(case), params, cache, x[:, start : start + length])
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    y = jnp.concatenate(outputs, axis=1)
    for row in range(2):
        expected, expected_cache = numpy_layer(case, x[row])
        close(y[row], expected)
        trees_close(row_of(cache, row), expected_cache)


def test_compiled_decode_in_a_scan_updates_a_donated_cache():
    case, x = "plain", normal(3, 2, 12, D)
    params, options = parameters(case), hashable(case)

    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(1)
    def generate(params, cache, tokens):
        def token(cache, x):
            y, cache = advance(options, params, cache, x[:, None])
            return cache, y[:, 0]

        cache, y = jax.lax.scan(token, cache, jnp.moveaxis(tokens, 1, 0))
        return jnp.moveaxis(y, 0, 1), cache

    first = empty_cache(case, 2)
    a, cache = generate(params, first, x[:, :6])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    b, _ = generate(params, cache, x[:, 6:])
    close(jnp.concatenate([a, b], axis=1), forward(options, params, x))


def test_stacked_layers_decode():
    """The cache follows flax's own scan over layers."""

    class Stack(nn.Module):
        decode: bool = False

        @nn.compact
        def __call__(self, x):
            class Block(nn.Module):
                decode: bool

                @nn.compact
                def __call__(self, x, _):
                    init = nn.initializers.normal(0.2)
                    mixer = layer(decode=self.decode, kernel_init=init, name="mixer")
                    return x + mixer(x), None

            axes = {"params": 0, "cache": 0}
            blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            return blocks(self.decode)(x, None)[0]

    x = normal(4, 2, 6, D)
    variables = Stack(decode=True).init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))
    a, mutated = Stack(decode=True).apply(variables, x[:, :5], mutable=["cache"])
    b, _ = Stack(decode=True).apply({"params": params} | mutated, x[:, 5:], mutable=["cache"])
    close(jnp.concatenate([a, b], axis=1), Stack().apply({"params": params}, x))


# Padding.

LENGTHS = (0, 1, 2, 5, 9, 11)


def padding(pattern, lengths, T):
    mask = np.zeros((len(lengths), T), bool)
    for row, n in enumerate(lengths):
        if pattern == "left":
            mask[row, T - n :] = True
        elif pattern == "right":
            mask[row, :n] = True
        else:
            mask[row, np.random.default_rng(row).permutation(T)[:n]] = True
    return jnp.asarray(mask)


@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
@pytest.mark.parametrize("case", ["grouped_negative", "no_convolution"])
def test_padding_is_as_good_as_absent(case, pattern):
    mask = padding(pattern, LENGTHS, 11)
    real = np.asarray(mask)
    x = jnp.where(mask[..., None], normal(5, len(LENGTHS), 11, D), jnp.nan)
    y, cache = advance(
        hashable(case), parameters(case), empty_cache(case, len(LENGTHS)), x, mask=mask
    )
    assert not np.any(np.asarray(y)[~real])
    for row in range(len(LENGTHS)):
        expected, expected_cache = numpy_layer(case, x[row][real[row]])
        close(y[row][real[row]], expected)
        trees_close(row_of(cache, row), expected_cache)


@pytest.mark.parametrize("pattern", ["left", "right"])
def test_padded_prefill_goes_on_from_each_rows_last_real_token(pattern):
    case, B = "plain", len(LENGTHS)
    options, params = hashable(case), parameters(case)
    x = normal(6, B, 22, D)
    masks = [padding(pattern, LENGTHS, 11), padding(pattern, (7, 0, 3, 1, 2, 6), 7)]
    mask = jnp.concatenate([*masks, jnp.ones((B, 4), bool)], axis=1)

    _, cache = advance(options, params, empty_cache(case, B), x[:, :11], mask=masks[0])
    _, cache = advance(options, params, cache, x[:, 11:18], mask=masks[1])
    outputs = []
    for t in range(18, 22):
        y, cache = advance(options, params, cache, x[:, t : t + 1])
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)

    for row in range(B):
        expected, expected_cache = numpy_layer(case, x[row][np.asarray(mask[row])])
        close(y[row], expected[-4:])
        trees_close(row_of(cache, row), expected_cache)


def test_one_padded_token_leaves_its_row_as_it_was():
    options, params = hashable("plain"), parameters("plain")
    _, cache = advance(options, params, empty_cache("plain", 2), normal(7, 2, 5, D))
    mask = jnp.array([[True], [False]])
    y, after = advance(options, params, cache, normal(8, 2, 1, D), mask=mask)
    second = functools.partial(jax.tree.map, lambda a: a[1])
    chex.assert_trees_all_equal(second(after), second(cache))
    assert not np.any(np.asarray(y[1])) and np.any(np.asarray(y[0]))


def test_gradients_with_padding_are_those_without():
    case = "grouped_negative"
    mask = padding("scattered", (5, 5), 8)
    x = jnp.where(mask[..., None], normal(5, 2, 8, D), jnp.nan)
    target = normal(9, 2, 8, D)

    def loss(params, x, target, mask):
        return jnp.sum(forward(hashable(case), params, x, mask=mask) * target)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    total, dx = gradients(parameters(case), x, target, mask)
    x, target = (a[jnp.nonzero(mask)].reshape(2, 5, D) for a in (x, target))
    expected, expected_dx = gradients(parameters(case), x, target, None)
    trees_close(total, expected)
    close(dx[jnp.nonzero(mask)], expected_dx.reshape(10, D))
    assert not np.any(np.asarray(dx)[~np.asarray(mask)])


# Segments.

SEGMENTS = ((4, 1, 6, 2), (1, 3, 3, 6))  # lengths, by row
IDS = jnp.array([[7] * 4 + [2] + [7] * 6 + [0] * 2, [1] + [0] * 3 + [5] * 3 + [0] * 6])


@pytest.mark.parametrize("case", ["grouped_negative", "no_convolution"])
def test_packed_is_separate(case):
    x = normal(5, 2, 13, D)
    y, cache = advance(hashable(case), parameters(case), empty_cache(case, 2), x, segment_ids=IDS)
    close(forward(hashable(case), parameters(case), x, segment_ids=IDS), y)
    for row, lengths in enumerate(SEGMENTS):
        pieces = np.split(np.asarray(x[row]), np.cumsum(lengths)[:-1])
        results = [numpy_layer(case, piece) for piece in pieces]
        close(y[row], np.concatenate([o for o, _ in results]))
        trees_close(row_of(cache, row), results[-1][1])


@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
def test_packed_and_padded(pattern):
    """13 packed tokens among 18; the ids at padded tokens mean nothing."""
    case, options, params = "plain", hashable("plain"), parameters("plain")
    x = normal(5, 2, 13, D)
    expected, whole = advance(options, params, empty_cache(case, 2), x, segment_ids=IDS)
    mask = padding(pattern, (13, 13), 18)
    wide = jnp.full((2, 18, D), jnp.nan).at[jnp.nonzero(mask)].set(x.reshape(26, D))
    ids = (100 + jnp.arange(36).reshape(2, 18)).at[jnp.nonzero(mask)].set(IDS.reshape(26))
    y, cache = advance(options, params, empty_cache(case, 2), wide, mask=mask, segment_ids=ids)
    close(y[jnp.nonzero(mask)], expected.reshape(26, D))
    trees_close(cache, whole)


def test_cache_belongs_to_the_first_segment():
    case, options, params = "plain", hashable("plain"), parameters("plain")
    x = normal(5, 1, 12, D)
    _, cache = advance(options, params, empty_cache(case, 1), x[:, :5])
    ids = jnp.array([[3, 3, 9, 9, 9, 9, 9]])
    y, cache = advance(options, params, cache, x[:, 5:], segment_ids=ids)
    (first, _), (second, last) = (numpy_layer(case, piece) for piece in (x[0, :7], x[0, 7:]))
    close(y[0], np.concatenate([first[5:], second]))
    trees_close(row_of(cache, 0), last)


# Training.


@pytest.mark.parametrize("case", ["bounded", "no_convolution"])
def test_gradients_are_finite_and_reach_every_parameter(case):
    x, target = normal(2, 2, 21, D), normal(3, 2, 21, D)
    # A token of zeros has a query and a key of zeros without the convolution.
    x = x.at[:, 4].set(0.0)

    def loss(params):
        return jnp.sum(forward(hashable(case), params, x) * target)

    gradients = jax.jit(jax.grad(loss))(parameters(case))
    chex.assert_tree_all_finite(gradients)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.linalg.norm(gradient) > 1e-6, jax.tree_util.keystr(path)


def test_a_jitted_donated_training_step_learns():
    """The target is the token before: nothing but time mixing can produce it."""
    module = layer()
    x = normal(2, 4, 32, D)
    target = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    params = module.init(jax.random.key(0), x)["params"]
    optimizer = optax.adam(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, optimizer_state):
        def loss(params):
            return jnp.mean((module.apply({"params": params}, x) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # adam counts in int32
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses[::10]


# Wrong arguments.

X = np.zeros((2, 5, D), np.float32)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        (
            {},
            dict(inputs=X[0]),
            ValueError,
            r"inputs must have axes \[B, T, D\], got shape \(5, 24\)",
        ),
        ({}, dict(inputs=X.astype(np.int32)), TypeError, "inputs must be .*float32, got int32"),
        ({}, dict(mask=np.ones((2, 4), bool)), ValueError, "mask has T = 4"),
        ({}, dict(mask=np.ones((2, 5, 5), bool)), ValueError, r"mask must have axes \[B, T\]"),
        ({}, dict(mask=np.ones((2, 5), np.float32)), TypeError, "mask must be bool, got float32"),
        ({}, dict(segment_ids=np.ones((1, 5), np.int32)), ValueError, "segment_ids has B = 1"),
        (
            {},
            dict(segment_ids=np.ones((2, 5))),
            TypeError,
            "segment_ids must be integers, got float",
        ),
        (dict(num_heads=0), {}, ValueError, "num_heads must be at least 1, got 0"),
        (dict(num_heads=2.0), {}, TypeError, "num_heads must be an integer, got 2.0"),
        (
            dict(num_value_heads=3),
            {},
            ValueError,
            "num_value_heads = 3 must be a multiple of num_heads",
        ),
        (
            dict(num_value_heads=1),
            {},
            ValueError,
            "num_value_heads = 1 must be a multiple of num_heads",
        ),
        (dict(head_dim=8), {}, ValueError, "head_dim must be 16 to 256, got 8"),
        (
            dict(head_dim=None, num_heads=5),
            {},
            ValueError,
            "= 24 must be a multiple of num_heads = 5",
        ),
        (dict(value_head_dim=512), {}, ValueError, "value_head_dim must be 16 to 256, got 512"),
        (dict(conv_size=1), {}, ValueError, "conv_size must be at least 2, got 1; None or 0"),
        (dict(conv_size=-4), {}, ValueError, "conv_size must be at least 2, got -4"),
        (dict(gate_lower_bound=5.0), {}, ValueError, "lower_bound must be negative, got 5.0"),
        (dict(implementation="fast"), {}, ValueError, "implementation must be None or one of"),
    ],
)
def test_wrong_arguments_raise(options, arguments, error, message):
    with pytest.raises(error, match=message):
        layer(options=PLAIN | options).init(jax.random.key(0), **dict(inputs=X) | arguments)


def test_decoding_without_a_fitting_cache_raises():
    params, module = parameters("plain"), layer(decode=True)
    with pytest.raises(ValueError, match='decode=True needs the "cache" collection'):
        module.apply({"params": params}, X, mutable=["cache"])
    variables = {"params": params, "cache": empty_cache("plain", 3)}
    with pytest.raises(ValueError, match=r"must have shape \(2, 2, 16, 16\).*got \(3, 2, 16, 16\)"):
        module.apply(variables, X, mutable=["cache"])
