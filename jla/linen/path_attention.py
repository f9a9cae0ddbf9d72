"""The layer of PaTH attention (arXiv 2505.16381)."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla._core import checks
from jla._core.cache import PathCache, without_rest
from jla._core.parts import l2norm
from jla.linen import _arguments
from jla.linen._normalize import RMSNorm
from jla.linen._padding import arrange
from jla.linen._projections import projected
from jla.linen._short_convolution import convolutions
from jla.path_attention import check_room, path_attention, run, step

f32 = jnp.float32


class PaTHAttention(nn.Module):
    r"""PaTH attention with its projections, the short convolution of `w`, gates and norms.

    For inputs :math:`x` [B, T, D], `HQ` query heads and `H` key/value heads (query head `j` uses
    key/value head `j // (HQ // H)`) of key dimension `K` and value dimension `V`:

    .. math::
      q &= W_q x, \quad k = W_k x, \quad v = W_v x \\
      w &= \mathrm{l2norm}(\mathrm{silu}(\mathrm{conv}(W_w^{up} W_w^{down} x))), \quad
      \beta = 2\, \mathrm{sigmoid}(W_b x + b_b) \\
      y &= W_o\, \mathrm{path\_attention}(q, k, v, w, \beta)

    With `use_forget_gate`, :math:`g = \mathrm{logsigmoid}(W_g x + b_g)` too (PaTH-FoX); with
    `use_qk_norm`, q and k first go through RMSNorm, head by head.

    The projections run in `dtype`; w, beta, g, the convolution's sums and the norms are computed in
    float32, and w stays float32.

    Parameters, their shapes and initial values (all `param_dtype`; exclude the norms' scales and
    the biases from weight decay):

    ===================  ===========  ====================================================
    q_proj               kernel       [D, HQ, K]
    k_proj, v_proj       kernel       [D, H, K], [D, H, V]
    w_proj_down          kernel       [D, w_rank], unless w_rank is None
    w_proj_up            kernel       [w_rank, H, K]; without w_rank it is w_proj, [D, H, K]
    w_conv1d             kernel       [conv_size, H, K], U(-conv_size**-0.5, conv_size**-0.5)
    b_proj               kernel,bias  [D, H], [H]; the bias is zero at first
    g_proj               kernel,bias  [D, HQ], [HQ], with `use_forget_gate`; as b_proj
    q_norm, k_norm       scale        [K], ones, with `use_qk_norm`
    o_proj               kernel       [HQ, V, D]
    ===================  ===========  ====================================================

    Kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance 1 / fan-in).
    This differs from torch's Linear, which a port from fla would have: uniform with variance
    1 / (3 fan-in), and such biases too.

    Decoding: with `decode=True` the "cache" collection holds `key` [B, S, H, K] (float32), `value`
    [B, S, H, V], `decay` [B, S, HQ] (float32, with `use_forget_gate`) and `length` [B] (int32), see
    `jla.PathCache`, and the convolution's last `conv_size - 1` inputs. `init` makes it, empty, for
    its input's batch and with its input's T as the capacity S, as flax's own attention does. Every
    `apply` with `mutable=["cache"]` then continues from the cache and advances it, by any number of
    tokens: a prefill in one call or several, then one token at a time. Rows have their own lengths,
    and padding takes no place. What does not fit raises ValueError outside of jit; inside, its
    outputs are NaN.

    Attributes:
      num_heads: HQ, a multiple of H.
      head_dim: K, 16 to 256; D // num_heads if None.
      num_kv_heads: H; HQ if None.
      value_head_dim: V, 16 to 256; K if None.
      use_forget_gate: whether there are gates.
      use_qk_norm: whether q and k are normalised.
      w_rank: the inner dimension of w's projection; None for a projection of full rank.
      conv_size: taps of w's convolution, at least 2; with None or 0 there is none, nor SiLU.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism, see :func:`jla.path_attention`.
      decode: whether to keep and use a cache.
    """

    num_heads: int
    head_dim: int | None = None
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    use_forget_gate: bool = False
    use_qk_norm: bool = False
    w_rank: int | None = 32
    conv_size: int | None = 3
    norm_epsilon: float = 1e-5
    dtype: nn.dtypes.Dtype | None = None
    param_dtype: nn.dtypes.Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    precision: nn.linear.PrecisionLike = None
    implementation: str | None = None
    decode: bool = False

    @nn.compact
    @checks.named
    def __call__(self, inputs, *, mask=None, segment_ids=None):
        """Applies the layer.

        Args:
          inputs: [B, T, D], bfloat16, float16 or float32.
          mask: bool [B, T], True at real tokens; padding may be anywhere in a row. A padded token
            is as good as absent: it leaves the cache and the convolution as they are, and its
            output is zero. With `decode`, every row's cache goes on from its own last real token.
          segment_ids: integers [B, T]: equal neighbours (with a mask: neighbouring real tokens) are
            one segment, and nothing crosses a border. With `decode`, the cache continues into each
            row's first segment, and comes out as that of its last.

        Returns:
          [B, T, D] in the dtype of the computation.

        Raises:
          TypeError: `inputs` is not floating, `mask` not bool or `segment_ids` not integers; an
            attribute of a wrong type.
          ValueError: shapes that disagree, head counts or sizes that `jla.path_attention` does not
            accept, a wrong `w_rank` or `conv_size`; with `decode`, no cache, one of another batch
            size, or one that is too small.
        """
        HQ, H, K, V = self._settings(inputs, mask, segment_ids)
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            precision=self.precision,
        )
        x, real, lengths, segments, restore = arrange(inputs, mask, segment_ids)

        q, k = dense((HQ, K), name="q_proj")(x), dense((H, K), name="k_proj")(x)
        v = dense((H, V), name="v_proj")(x)
        self._check_cache(x.shape[0], x.shape[1], HQ, H, K, V, v.dtype)
        if self.use_qk_norm:
            norm = functools.partial(
                RMSNorm,
                self.norm_epsilon,
                param_dtype=self.param_dtype,
                implementation=_arguments.own_choice(self.implementation),
            )
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if self.w_rank is None:
            w = dense((H, K), name="w_proj")(x)
        else:
            w = dense((H, K), name="w_proj_up")(dense(self.w_rank, name="w_proj_down")(x))
        w = convolutions(self, segments, lengths, without=lambda x: x)(w, "w_conv1d")
        w = l2norm(w.astype(f32))
        beta = 2.0 * nn.sigmoid(dense(H, use_bias=True, name="b_proj")(x).astype(f32))
        g = None
        if self.use_forget_gate:
            g = nn.log_sigmoid(dense(HQ, use_bias=True, name="g_proj")(x).astype(f32))
        if real is not None:
            beta = jnp.where(real[..., None], beta, 0.0)
            g = None if g is None else jnp.where(real[..., None], g, 0.0)

        o = self._mechanism(q, k, v, w, beta, g, segments, real, lengths)
        return restore(projected(o, dense, inputs.shape[-1]))

    def _mechanism(self, q, k, v, w, beta, g, segments, real, lengths):
        """Runs `path_attention`, or `path_step` for one token, from the cache if there is one."""
        arguments = q, k, v, w, beta, g
        (B, T, H, K), V, HQ = k.shape, v.shape[3], q.shape[2]
        if self.decode:
            names = ["key", "value", "length"] if g is None else list(PathCache._fields)
            empty = functools.partial(
                PathCache.empty, B, T, H, K, V, query_heads=None if g is None else HQ, dtype=v.dtype
            )
            variables = {
                name: self.variable("cache", name, lambda name=name: getattr(empty(), name))
                for name in names
            }
        if not self.decode or self.is_initializing():
            run_all = functools.partial(path_attention, implementation=self.implementation)
            run_all = _arguments.unless_initializing(self, run_all)
            return run_all(*arguments, segment_ids=segments)[0]

        cache = PathCache(**dict(decay=None) | {n: x.value for n, x in variables.items()})
        # Padding, behind the real tokens, may find no room; they are what must fit.
        check_room(
            cache, T if lengths is None else lengths, segments, set_by="the length of init's input"
        )
        options = dict(scale=K**-0.5, implementation=self.implementation)
        o, cache = _advance(arguments, cache, segments, real, lengths, **options)
        for name, variable in variables.items():
            variable.value = getattr(cache, name)
        return o

    def _check_cache(self, B, T, HQ, H, K, V, dtype):
        """Raises ValueError unless a decoding call has a cache for these sizes."""
        S = T
        if self.has_variable("cache", "key"):
            S = self.get_variable("cache", "key").shape[1]
        entries = dict(key=((B, S, H, K), f32), value=((B, S, H, V), dtype))
        entries |= dict(length=((B,), jnp.int32))
        if self.use_forget_gate:
            entries |= dict(decay=((B, S, HQ), f32))
        _arguments.check_cache(self, **entries)

    def _settings(self, inputs, mask, segment_ids):
        """Checks the call's arguments and the attributes; returns HQ, H, K and V."""
        D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        HQ = self.num_heads
        _arguments.check_size("num_heads", HQ, 1)
        H = HQ if self.num_kv_heads is None else self.num_kv_heads
        _arguments.check_size("num_kv_heads", H, 1)
        checks.check_multiple("num_heads", HQ, "num_kv_heads", H)
        K, V = _arguments.head_dims(
            D, HQ, head_dim=self.head_dim, value_head_dim=self.value_head_dim
        )
        if self.w_rank is not None:
            _arguments.check_size("w_rank", self.w_rank, 1, "; None is for full rank")
        _arguments.check_conv_size(self.conv_size)
        return HQ, H, K, V


# Jitted, so that no NaN of padding that finds no room leaves it: `jax_debug_nans` would stop there.
@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def _advance(arguments, cache, segments, real, lengths, *, scale, implementation):
    """The outputs of the real tokens, zeros for the padding, and the cache with those tokens."""
    options = dict(scale=scale, implementation=implementation)
    T = arguments[0].shape[1]
    if T == 1:
        one = (None if x is None else x[:, 0] for x in arguments)
        o, cache = step(*one, cache, **options)
        o = o[:, None]
    else:
        o, cache = run(*arguments, cache, segments, **options)
    if lengths is not None:
        # The maps of padding, behind the real tokens, did nothing.
        cache = without_rest(cache._replace(length=cache.length - (T - lengths)))
        o = jnp.where(real[..., None, None], o, 0.0)
    return o, cache
