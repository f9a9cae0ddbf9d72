"""What the layers share: attributes, projections, convolutions, masks, segments and the cache."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla._core import axes, checks, pools, sequence, whole
from jla._core.parts import l2norm
from jla._core.types import Implementation
from jla._core.whole import Names
from jla.linen import _arguments
from jla.linen._normalize import RMSNorm
from jla.linen._padding import arrange, of_live_rows, of_live_segments, zeros_elsewhere
from jla.linen._projections import by_heads, copies, dense, sum_over_heads
from jla.linen._short_convolution import ShortConvolution

f32 = jnp.float32


class Tokens(NamedTuple):
    """A call's tokens, the real ones of each row first.

    Attributes:
      x: [B, T, D]; padding is zeros.
      real: bool [B, T], True at the real tokens of x; None without a mask.
      lengths: int32 [B], the number of real tokens in each row; None without a mask.
      segments: int32 [B, T], numbered 0, 1, ... in each row; with `axis_name` the ids as they are;
        None without `segment_ids`. With slots for each segment the ids, -1 at padding.
      restore: moves outputs [B, T, D] back; they are zero at padding.
      copies: x once for each device that heads are split over, see `_projections.copies`; or None.
      slots: int32 [B], the rows of the cache that the rows go on from; None if they are the same.
        Or [B, N], those of each row's segments.
    """

    x: jax.Array
    real: jax.Array | None
    lengths: jax.Array | None
    segments: jax.Array | None
    restore: Callable
    copies: jax.Array | None = None
    slots: jax.Array | None = None

    def zero_padding(self, x, at_padding=0.0):
        """x [B, T, ...] with `at_padding` where the token is not real."""
        if self.real is None:
            return x
        return jnp.where(self.real.reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, at_padding)


def arranged(inputs, mask, segment_ids, slots=None):
    """The tokens of a call whose arguments were checked."""
    if slots is None:
        return Tokens(*arrange(inputs, mask, segment_ids))
    if slots.ndim == 2:
        x, ids, slots, restore = of_live_segments(inputs, mask, segment_ids, slots)
        return Tokens(x, None, None, ids, restore, slots=slots)
    inputs, mask, slots = of_live_rows(inputs, mask, slots)
    tokens = Tokens(*arrange(inputs, mask, segment_ids), slots=slots)
    return tokens._replace(restore=zeros_elsewhere(tokens.restore, slots))


class Cache(NamedTuple):
    """The variables of the "cache" collection that hold a mechanism's state.

    Attributes:
      make: makes the state of the variables' values, given by name.
      variables: by name, in the order of the state's leaves.
      slots: int32 [B], or [B, N] for segments, the rows of the variables that a call starts from;
        None for all. Those rows' states have the axes of the slots.
    """

    make: Callable
    variables: dict
    slots: jax.Array | None = None

    def rows(self, name):
        """The call's rows of a variable."""
        x = self.variables[name].value
        return x if self.slots is None else pools.take(x, self.slots)

    def set_rows(self, name, x):
        """Sets the call's rows of a variable."""
        variable = self.variables[name]
        variable.value = x if self.slots is None else pools.put(variable.value, x, self.slots)

    @property
    def whole(self):
        """The state of all rows of the variables."""
        return self.make(**{name: x.value for name, x in self.variables.items()})

    @property
    def state(self):
        """The state of the call's rows."""
        return self.make(**{name: self.rows(name) for name in self.variables})

    def replace(self, state):
        """Sets the state of all rows."""
        for variable, x in zip(self.variables.values(), jax.tree.leaves(state), strict=True):
            variable.value = x

    def update(self, state):
        """Sets the state of the call's rows."""
        for name, x in zip(self.variables, jax.tree.leaves(state), strict=True):
            self.set_rows(name, x)


class Mixer(nn.Module):
    """The base of the layers, each a function of inputs [B, T, D] to [B, T, D], token by token.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.MesaNet(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Arguments of a call, of all layers:
      inputs: [B, T, D], bfloat16, float16 or float32.
      mask: bool [B, T], True at real tokens; padding may be anywhere in a row. Padding tokens are
        ignored: the state, the convolutions and positions are as without them, and their output is
        zero. With `decode`, each row's cache continues from its last real token.
      segment_ids: integers [B, T]: equal neighbours (with a mask: neighbouring real tokens) are one
        segment, and nothing crosses a border. With `decode`, the cache continues into each row's
        first segment, and is that of its last segment afterwards.
      slots: int32 [B], with `decode`: the rows of the cache that the inputs' rows go on from. The
        cache then is a pool of any number of rows, that of `init`'s inputs. -1 is a row without a
        sequence: its output is zero, and nothing is written. Or int32 [B, N], with segment_ids
        0 to N - 1: those of each row's segments, each in one place of its row; a segment that is
        absent or has the slot -1, and tokens with the id -1, write nothing. See docs/pools.md.

    It returns [B, T, D] in the dtype of the computation, and raises TypeError or ValueError, with
    the layer's name and the argument's, for wrong dtypes, shapes that disagree, attributes that the
    mechanism does not accept, and with `decode` for a cache that is missing or does not fit.

    Initial values: kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance
    1 / fan-in), and biases are zero. fla's layers use torch's Linear initialisation instead:
    uniform with variance 1 / (3 fan-in), biases too.

    Decoding: with `decode=True` the "cache" collection holds the mechanism's state and each
    convolution's last `conv_size - 1` inputs. `init` makes it, empty, for its input's batch; T does
    not matter (but for PaTHAttention). Every `apply` with `mutable=["cache"]` continues from the
    cache and advances it, by any number of tokens: a prefill in one call or several, then one token
    at a time.

    A layer adds its own attributes, `sizes` and `__call__`, which holds its projections and its
    formula:

        tokens, sizes = self.begin(inputs, mask, segment_ids, slots)
        ...
        o = self.mix(run, step, arrays, cache)
        return self.finish(o, tokens)

    Attributes, of all layers:
      num_heads: the heads of the output, each of `value_dim` features.
      key_dim: K, the features of a head's query and key, 16 to 256; D // num_heads if None.
      value_dim: V, the features of a head's value and output, 16 to 256; key_dim if None.
      conv_size: taps of the convolutions, at least 2; with None or 0 there are none.
      conv_bias: whether the convolutions have a bias, [heads, features], zeros at first.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters, but for those that are always float32.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism: "reference", "xla", "pallas", "triton", or None for the
        fastest that supports the arguments. The layer's norms, convolutions and projections follow
        it where it is "reference" or "xla". Elsewhere they choose for themselves, because their
        kernels may not support what the mechanism's support.
      decode: whether to keep and use a cache.
      axis_name: inside `jax.shard_map`, the manual axis of the mesh that T is split over, see
        docs/scale.md: the inputs are one device's tokens. There is then no mask and no cache.
        `init` ignores it, and runs outside.
      mesh_axes: for whole arrays under `jit`, the axes of the mesh in force that split rows, time
        and heads, such as `dict(B="data", T="seq", H="model")`, each of which may be left out; see
        docs/scale.md. There is then no cache, and no mask if time is split. `init` ignores it.
    """

    num_heads: int
    key_dim: int | None = None
    value_dim: int | None = None
    conv_size: int | None = 4
    conv_bias: bool = False
    norm_epsilon: float = 1e-5
    dtype: nn.dtypes.Dtype | None = None
    param_dtype: nn.dtypes.Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    precision: nn.linear.PrecisionLike = None
    implementation: Implementation | None = None
    decode: bool = False
    axis_name: str | None = None
    mesh_axes: Mapping[str, Names] | None = None

    packs_states = True  # whether slots may be [B, N]; no attribute of the dataclass

    def sizes(self, T, D):
        """Checks the layer's own attributes; returns what `begin` hands to `__call__`."""
        raise NotImplementedError(f"{type(self).__name__} must define sizes(T, D); see Mixer")

    def heads_and_dims(
        self, D, num_key_heads=None, dims_per="num_heads", accepted=checks.HEAD_DIMS, **more
    ):
        """Checks counts of heads and dimensions; returns H, the key heads, K, V and `more`, which
        are sizes like `key_dim` that default to it.

        Args:
          num_key_heads: `num_heads` if None.
          dims_per: the attribute by whose value D is divided for the default of `key_dim`.
          accepted: the range of all dimensions.
        """
        H = self.num_heads
        _arguments.check_size("num_heads", H, 1)
        HK = H if num_key_heads is None else num_key_heads
        _arguments.check_size("num_key_heads", HK, 1)
        checks.check_multiple("num_heads", H, "num_key_heads", HK)
        per = dims_per, getattr(self, dims_per)
        dims = dict(key_dim=self.key_dim, value_dim=self.value_dim, **more)
        return H, HK, *_arguments.head_dims(D, per, accepted, **dims)

    def begin(self, inputs, mask, segment_ids, slots=None):
        """Checks the call's arguments and the attributes; returns the tokens and the sizes."""
        _arguments.check_attributes(self)
        T, D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        _arguments.check_convolution(self.conv_size, self.conv_bias)
        _arguments.check_slots(self, slots, inputs, mask, segment_ids)
        split = _arguments.split_of(self)
        if split is None and self.split_over is None:
            return arranged(inputs, mask, segment_ids, slots), self.sizes(T, D)
        _arguments.refuse_over_devices(self, mask)
        if split is None:
            T *= sequence.devices_of(self.axis_name)
        sizes = self.sizes(T, D)
        if self.split_over is None:
            tokens = arranged(inputs, mask, segment_ids)
        else:
            # The ids themselves: numbers of segments would begin anew on each device.
            tokens = Tokens(jnp.asarray(inputs), None, None, segment_ids, lambda y: y)
        return tokens._replace(copies=copies(tokens.x, split)), sizes

    @property
    def split_over(self):
        """The axis that T is split over; None in `init`, which runs outside of shard_map."""
        return _arguments.split_over(self)

    def on_mesh(self, function, table, **arguments):
        """`function(**arguments)`, outputs and a state; with `mesh_axes` in a shard_map, and then
        the state is None.

        Args:
          function: a mechanism, as `table` (of `jla._core.axes`) says.
        """
        split = _arguments.split_of(self)
        if split is None:
            return function(**arguments, axis_name=self.split_over)
        arrays = {n: x for n, x in arguments.items() if n in table and x is not None}
        # Without a cache there is no initial state.
        options = {n: x for n, x in arguments.items() if n not in table and n != "initial_state"}

        def run(**arrays):
            return function(**arrays, **options, axis_name=self.split_over)[0]

        shared = axes.shared_heads(table)
        return whole.call(run, arrays, table, table["o"], split, shared), None

    def finish(self, o, tokens, **options):
        """The output projection of o [B, T, H, V], at the tokens' own places."""
        by = functools.partial(sum_over_heads, self.own_choice())
        options |= dict(axis=(-2, -1), dot_general_cls=by)
        dense = self.dense(tokens.x.shape[-1], "o_proj", **options)
        return tokens.restore(dense(o))

    def dense(self, features, name, *, kind=nn.DenseGeneral, use_bias=False, **options):
        """A projection to these features, a number or several axes."""
        return dense(
            _arguments.split_of(self),
            features,
            kind=kind,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            precision=self.precision,
            name=name,
            implementation=self.own_choice(),
            **options,
        )

    def project(self, tokens, features, name, **options):
        """A projection of the tokens to heads, or to heads and their features."""
        heads = features if isinstance(features, int) else features[0]
        x = tokens.copies
        if x is None or heads % x.shape[0]:
            return self.dense(features, name, **options)(tokens.x)
        y = self.dense(features, name, dot_general_cls=by_heads, **options)(x)
        return (y[0][0], *y[1:]) if isinstance(y, tuple) else y[0]

    def low_rank(self, tokens, features, name, rank, **options):
        """A projection by way of `rank` features, `name`_down and `name`_up; None: by one matrix.

        The options are those of the one, or of the second of two.
        """
        if rank is None:
            return self.project(tokens, features, name, **options)
        down = self.dense(rank, f"{name}_down")
        return self.dense(features, f"{name}_up", **options)(down(tokens.x))

    def convolve(self, x, name, tokens, *, normalize=False, silu_twice=False, otherwise=nn.silu):
        """The short convolution of x [B, T, H, D] and SiLU, as `ShortConvolution` has them;
        `otherwise` of x where there are no convolutions."""
        if not self.conv_size:
            y = otherwise(x)
            y = nn.silu(y) if silu_twice else y
            return l2norm(y) if normalize else y
        convolution = self.convolution(name, normalize=normalize, silu_twice=silu_twice)
        return convolution(x, tokens.segments, tokens.lengths, tokens.slots)

    def convolution(self, name, **options):
        """The module of a short convolution."""
        return ShortConvolution(
            self.conv_size,
            use_bias=self.conv_bias,
            param_dtype=self.param_dtype,
            implementation=self.own_choice(),
            decode=self.decode,
            axis_name=self.split_over,
            mesh_axes=self.mesh_axes,
            name=name,
            **options,
        )

    def norm(self, name, kind=RMSNorm, **options):
        """One of the layer's norms."""
        return kind(
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            implementation=self.own_choice(),
            mesh_axes=self.mesh_axes,
            name=name,
            **options,
        )

    def own_choice(self):
        """The implementation of the layer's norms and convolutions; see the class."""
        return self.implementation if self.implementation in ("reference", "xla") else None

    def cached(self, make, tokens, **entries):
        """The cache of the mechanism's state, checked; None without `decode`.

        Args:
          make: as `Cache` has it.
          tokens: from `begin`.
          entries: shape and dtype of each variable, in the order of the state's leaves.
        """
        if not self.decode:
            return None
        _arguments.check_cache(self, tokens.slots, **entries)
        variables = {
            name: self.variable("cache", name, jnp.zeros, *entry) for name, entry in entries.items()
        }
        return Cache(make, variables, tokens.slots)

    def mix(self, run, step, arrays, cache):
        """The mechanism's outputs [B, T, H, V]; without a cache, or from it, which then advances.

        In `init` nothing runs, see `_arguments.unless_initializing`.

        Args:
          run: `run(*arrays, state)` returns outputs and the new state, `run(*arrays)` with no state
            outputs and anything.
          step: the same of one token, whose arrays have no axis of time; None if `run` does it. Of
            a pool it takes and returns all rows, and `slots`.
          arrays: [B, T, ...].
          cache: from `cached`.
        """
        run = _arguments.unless_initializing(self, run)
        if cache is None:
            return run(*arrays)[0]
        by_segment = cache.slots is not None and cache.slots.ndim == 2
        if step is not None and arrays[0].shape[1] == 1 and not by_segment:
            step = _arguments.unless_initializing(self, step)
            one = (None if x is None else x[:, 0] for x in arrays)
            slots = {} if cache.slots is None else dict(slots=cache.slots)
            o, state = step(*one, cache.whole, **slots)
            if not self.is_initializing():
                cache.replace(state)
            return o[:, None]
        o, state = run(*arrays, cache.state)
        if not self.is_initializing():
            cache.update(state)
        return o
