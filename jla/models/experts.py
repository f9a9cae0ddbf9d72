"""A mixture of experts: SwiGLU layers, of which each token uses the few that its scores choose."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax

from jla._core import checks, whole
from jla._core.varying import alike
from jla._core.whole import Names
from jla.linen import _arguments
from jla.models.mlp import SwiGLU

f32 = jnp.float32
# H is the inside of the experts, which is split with the heads.
_LETTERS = dict(x="B T D", kernel="D E", bias="E", gate="E D H", up="E D H", down="E H D")


class Experts(nn.Module):
    """Mixture of SwiGLU experts with sigmoid scores (arXiv 2412.19437), and experts for all tokens.

    For tokens x [..., D], E experts, and n of them for each token:

        p = sigmoid(x W_r);   the chosen experts are those with the n largest p + b
        w_e = p_e for the chosen e; with `renormalize` divided by their sum; times `routed_scale`
        y = sum_e w_e W_down,e (silu(W_gate,e x) * (W_up,e x)) + shared(x)

    With `num_groups` G > 1, the experts lie in G groups of neighbours. A group counts as much as
    the sum of its two largest p + b, and only experts of the `groups_per_token` best groups can be
    chosen. Experts have no capacity: each computes all tokens that choose it, so that no token's
    result depends on another token, padding included.

    Scores and weights are float32, the experts' products are in `dtype`. The correction bias b
    balances the experts: it only takes part in the choice and has no gradient. Whoever trains sets
    it by the experts' load, or leaves it as it is; keep it out of the optimizer.

    A loop runs over blocks of tokens that chose the same expert. Where there are fewer choices than
    experts, as in decoding, each choice reads its own expert's matrices. To split the experts over
    devices, shard `hidden` (the last axis of gate and up, the middle one of down).

    Parameters, their shapes and initial values (`param_dtype`, the router excepted):

    ==========================  =====================  ===================================
    router                      kernel                 [D, E], float32
    router                      correction_bias        [E], float32, zeros
    gate, up                                           [E, D, hidden]
    down                                               [E, hidden, D]
    shared/gate, shared/up      kernel                 [D, shared_hidden]
    shared/down                 kernel                 [shared_hidden, D]
    ==========================  =====================  ===================================

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.models.Experts(num_experts=8, experts_per_token=2, hidden=32)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes:
      num_experts: E.
      experts_per_token: n.
      hidden: the width inside each expert.
      shared_hidden: the width inside the shared experts, which are one SwiGLU; 0 for none.
      num_groups: of which num_experts is a multiple.
      groups_per_token: the groups that a token can choose experts of.
      renormalize: whether a token's weights are divided by their sum.
      routed_scale: what all weights are multiplied by.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters but the router's.
      kernel_init: initializer of the kernels.
      mesh_axes: for inputs [B, T, D], as in the layers of `jla.linen`: each device computes its own
        tokens, and H are the axes of the mesh that split `hidden`, of which it is a multiple. With
        a manual axis there is nothing to say: tokens do not depend on one another.
    """

    num_experts: int
    experts_per_token: int
    hidden: int
    shared_hidden: int = 0
    num_groups: int = 1
    groups_per_token: int = 1
    renormalize: bool = True
    routed_scale: float = 1.0
    dtype: Dtype | None = None
    param_dtype: Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    mesh_axes: Mapping[str, Names] | None = None

    @nn.compact
    @checks.named
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to inputs [..., D]; returns the same shape, in `dtype`.

        Raises:
          TypeError, ValueError: wrong dtypes, or attributes that do not fit one another.
        """
        self._check(inputs)
        D, E, I = inputs.shape[-1], self.num_experts, self.hidden
        split = _arguments.split_of(self)
        if split is not None and inputs.ndim != 3:
            raise ValueError(f"inputs must be [B, T, D] with mesh_axes, got {inputs.shape}")
        router = Router(E, self.kernel_init, name="router")(D)
        shapes = dict(gate=(E, D, I), up=(E, D, I), down=(E, I, D))
        matrices = [
            self.param(name, _for_each(self.kernel_init), shape, self.param_dtype)
            for name, shape in shapes.items()
        ]
        x, *cast = promote_dtype(inputs, *matrices, dtype=self.dtype)
        # On a mesh the cast is made behind the sum of the devices' gradients.
        matrices = cast if split is None else matrices
        arrays = dict(x=inputs, **router, **dict(zip(shapes, matrices, strict=True)))
        over = () if split is None else split["H"]
        run = functools.partial(self._mixture, dtype=x.dtype, over=over)
        if split is None:
            y = run(**arrays)
        else:
            y = whole.call(run, arrays, _LETTERS, "B T D", split, shared=())
        if self.shared_hidden:
            shared = SwiGLU(
                self.shared_hidden,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                mesh_axes=self.mesh_axes,
                name="shared",
            )
            y = y + shared(x)
        return y

    def _mixture(self, x, kernel, bias, gate, up, down, *, dtype, over):
        """The chosen experts' sum, x's shape; of the parts of experts on all devices of `over`."""
        x, kernel, bias, gate, up, down = alike(x, kernel, bias, gate, up, down)
        gate, up, down = (matrices.astype(dtype) for matrices in (gate, up, down))
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self._route(rows, kernel, bias)
        y = mixture(rows.astype(dtype), chosen, weights, gate, up, down)
        y = lax.psum(y, over) if over else y
        return y.astype(dtype).reshape(x.shape)

    def _route(self, x, kernel, bias):
        """The experts of x [N, D], int32 [N, n], and their weights, float32 [N, n]."""
        # Exact products, also on a GPU: rounding must not choose another expert.
        logits = jnp.dot(x.astype(f32), kernel, precision=lax.Precision.HIGHEST)
        scores = nn.sigmoid(logits)
        chosen = self._choose(lax.stop_gradient(scores + bias[None]))
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
        return chosen, weights * self.routed_scale

    def _choose(self, merits):
        """The n best of the merits [N, E], among the experts of the best groups."""
        G, size = self.num_groups, self.num_experts // self.num_groups
        if self.groups_per_token < G:
            grouped = merits.reshape(-1, G, size)
            best_two = lax.top_k(grouped, min(2, size))[0].sum(-1)
            groups = lax.top_k(best_two, self.groups_per_token)[1]
            kept = (groups[:, :, None] == jnp.arange(G)[None, None]).any(1)
            merits = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(merits.shape)
        return lax.top_k(merits, self.experts_per_token)[1]

    def _check(self, inputs):
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) is not None:
                checks.check_float_dtype(name, getattr(self, name))
        checks.check_dtype("inputs", inputs, checks.FLOAT_DTYPES)
        counts = ("num_experts", "experts_per_token", "hidden", "num_groups", "groups_per_token")
        for name in counts:
            _arguments.check_size(name, getattr(self, name), 1)
        _arguments.check_size("shared_hidden", self.shared_hidden, 0)
        E, G = self.num_experts, self.num_groups
        checks.check_multiple("num_experts", E, "num_groups", G)
        if self.groups_per_token > G:
            raise ValueError(
                f"groups_per_token must be at most num_groups = {G}, got {self.groups_per_token}"
            )
        most = self.groups_per_token * (E // G)
        if self.experts_per_token > most:
            raise ValueError(
                f"experts_per_token must be at most {most}, the experts of groups_per_token = "
                f"{self.groups_per_token} groups, got {self.experts_per_token}"
            )


class Router(nn.Module):
    """The parameters that choose experts, float32; see `Experts`."""

    num_experts: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, D):
        """Returns kernel [D, E] and correction bias [E], by name."""
        parameter = functools.partial(_arguments.float32_parameter, self)
        kernel = parameter("kernel", self.kernel_init, (D, self.num_experts))
        bias = parameter("correction_bias", nn.initializers.zeros, (self.num_experts,))
        return dict(kernel=kernel, bias=bias)


def mixture(x, chosen, weights, gate, up, down):
    """The weighted sum of the chosen experts' results.

    Args:
      x: [N, D].
      chosen, weights: the experts of each row, and their weights, [N, n].
      gate, up, down: the experts' matrices, [E, D, I] twice and [E, I, D], in x's dtype.

    Returns:
      [N, D], float32.
    """
    (N, n), E = chosen.shape, gate.shape[0]
    rows = jnp.broadcast_to(x[:, None], (N, n, x.shape[1])).reshape(N * n, -1)
    experts = chosen.reshape(-1)
    if N * n < E:
        y = _each_its_own(rows, experts, gate, up, down)
    else:
        y = _sorted(rows, experts, gate, up, down)
    y = y.reshape(N, n, -1).astype(f32) * weights[:, :, None]
    return y.sum(1)


def _sorted(rows, experts, gate, up, down):
    """The result of each row's expert, [R, D]: rows are sorted by expert into blocks of one expert.

    Not by `lax.ragged_dot`: for a GPU, XLA writes out all rows once for each expert (JAX 0.11.2 and
    0.12; 8192 rows of Kimi Linear take 10 GB, and with gradients 32).
    """
    (R, D), E = rows.shape, gate.shape[0]
    # About as many rows as an expert has.
    size = min(max(1 << (R // E).bit_length(), 16), 256)
    rows_of = jnp.bincount(experts, length=E)
    blocks_of = -(-rows_of // size)
    before, blocks_before = (jnp.cumsum(x) - x for x in (rows_of, blocks_of))
    blocks = R // size + E  # the most that there can be
    expert_of = jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(blocks), side="right")
    expert_of = jnp.minimum(expert_of, E - 1)  # of blocks of zeros behind the others
    # Each row's place among those of the blocks.
    order = jnp.argsort(experts, stable=True)
    sorted_experts = experts[order]
    places = (blocks_before * size - before)[sorted_experts] + jnp.arange(R)
    places = _put(jnp.zeros_like(places), order, places)
    x = _put(jnp.zeros((blocks * size, D), rows.dtype), places, rows)
    y = _blockwise(x.reshape(blocks, size, D), expert_of, gate, up, down)
    return y.reshape(-1, D).at[places].get(unique_indices=True, mode="promise_in_bounds")


def _put(x, places, rows):
    """x with rows at places that differ. Its gradient has no sums: always the same bits."""
    return x.at[places].set(rows, unique_indices=True, mode="promise_in_bounds")


@jax.custom_vjp
def _blockwise(x, experts, gate, up, down):
    """Each block of rows [blocks, size, D] through its expert."""
    return lax.map(
        lambda block: _swiglu(block[0], *_of_expert(block[1], gate, up, down)), (x, experts)
    )


def _blockwise_forward(*arguments):
    return _blockwise(*arguments), arguments


def _blockwise_backward(arguments, cotangents):
    """Adds each block's gradients to its expert's, in place. The gradient of a loop, as JAX makes
    it, would add zeros to those of all other experts at each block."""
    x, experts, *matrices = arguments

    def block(sums, one):
        x, expert, cotangent = one
        _, pull = jax.vjp(_swiglu, x, *_of_expert(expert, *matrices))
        dx, *gradients = pull(cotangent)
        added = [
            total.at[expert].add(gradient.astype(f32))
            for total, gradient in zip(sums, gradients, strict=True)
        ]
        return added, dx

    # A select: a loop's carry has one type, and the sums vary over a mesh's axes as x does.
    zeros = [jnp.where(False, matrix, 0.0).astype(f32) for matrix in matrices]
    sums, dx = lax.scan(block, zeros, (x, experts, cotangents))
    gradients = (total.astype(matrix.dtype) for total, matrix in zip(sums, matrices, strict=True))
    return dx, None, *gradients


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _of_expert(expert, *matrices):
    return [lax.dynamic_index_in_dim(matrix, expert, keepdims=False) for matrix in matrices]


def _swiglu(x, gate, up, down):
    return (nn.silu(x @ gate) * (x @ up)) @ down


def _each_its_own(rows, experts, gate, up, down):
    """The same for few rows. As sums, which XLA fuses with the reading of the experts' matrices:
    only those of the chosen experts are read, and none is copied."""
    one = dict(mode="promise_in_bounds")

    def product(x, matrices):
        matrices = matrices.at[experts].get(**one)
        return jnp.sum(x[:, :, None].astype(f32) * matrices.astype(f32), axis=1)

    hidden = (nn.silu(product(rows, gate)) * product(rows, up)).astype(rows.dtype)
    return product(hidden, down).astype(rows.dtype)


def _for_each(init):
    """The initializer of a stack of matrices, each drawn by `init` for itself."""

    def stack(key, shape, dtype):
        keys = jax.random.split(key, shape[0])
        return jax.vmap(lambda key: init(key, shape[1:], dtype))(keys)

    return stack
