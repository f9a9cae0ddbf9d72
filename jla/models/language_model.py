"""A causal language model: embedding, blocks of a mixer and an MLP, the last norm and the head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.extend.core import Primitive

from jla._core import checks, packed
from jla._core.types import Implementation
from jla._core.whole import Names
from jla.linen import RMSNorm, _arguments
from jla.linen._projections import dense, dot
from jla.models.config import Config, Layer

f32 = jnp.float32
weight_init = nn.initializers.normal(0.02)
SMALL_VOCABULARY = 2048


def kept(primitive: Primitive, *_: object, **parameters: object) -> bool:
    """A policy of rematerialisation (`LanguageModel.remat`): what a block's backward pass takes as
    it was. It is the products' and kernels' results, what goes into an MLP's last product, and the
    stream before the branches.

    All else (convolutions, gates, norms of heads) is made again from these. A scan over blocks
    would write it to memory, most of it in float32, and read it back, which takes longer.

    Example:
      layer = jla.models.Layer(jla.models.Attention(num_heads=4), jla.models.SwiGLU(128))
      config = jla.models.Config(vocabulary=256, width=64, layers=(layer,) * 2)
      model = jla.models.LanguageModel(config, stacked=True, remat=jla.models.kept)
    """
    return parameters.get("name") in ("residual_stream", "hidden") or primitive.name in (
        "dot_general",
        "custom_vmap_call",  # jla's kernels
        "dot_product_attention_fwd_wrapper",  # cuDNN's attention
    )


def is_matrix(path) -> bool:
    """Whether the parameter at this path of `jax.tree_util` is a matrix that layers multiply with
    in the model's dtype, and so can be cast to it beforehand. A router's is float32."""
    name, module = path[-1].key, path[-2].key
    if name == "kernel":
        return not module.endswith("conv1d") and module != "router"
    return name in ("embedding", "gate", "up", "down")


def cast_matrices(params, dtype):
    """Parameters with their matrices in the dtype that they are multiplied in."""
    cast = jax.tree_util.tree_map_with_path
    return cast(lambda path, x: x.astype(dtype) if is_matrix(path) else x, params)


def norms_implementation(implementation: Implementation | None) -> Implementation | None:
    """That of the norms beside a mixer of this one: they choose by themselves beside kernels, which
    need not serve the norms too (of one token, for example)."""
    return implementation if implementation in ("reference", "xla") else None


class Block(nn.Module):
    """The two residual branches of a layer, each behind an RMSNorm.

    Takes and returns the stream and what is still to be added to it, which the next norm does.
    """

    layer: Layer
    norm_epsilon: float
    dtype: Dtype
    param_dtype: Dtype
    implementation: Implementation | None
    decode: bool
    mesh_axes: Mapping[str, Names] | None

    @nn.compact
    def __call__(self, stream, mask, segment_ids, slots=None):
        def adopted(name):
            template = getattr(self.layer, name)
            changes = {field: getattr(self, field) for field in shared_fields(template)}
            return template.clone(parent=self, name=name, **changes)

        norm = functools.partial(
            RMSNorm,
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            implementation=norms_implementation(self.implementation),
            mesh_axes=self.mesh_axes,
        )
        # `branch`, not nn.RMSNorm: on a GPU one kernel adds and normalises, and one makes the
        # norm's gradient and adds that of the stream, which XLA would do in five passes.
        y, x = norm(name="mixer_norm").branch(*stream)
        on_pool = checks.given(slots=slots)
        update = adopted("mixer")(y, mask=mask, segment_ids=segment_ids, **on_pool)
        y, x = norm(name="mlp_norm").branch(x, update)
        return (x, adopted("mlp")(y)), None


def shared_fields(template: nn.Module) -> list[str]:
    """The fields of a layer's template that are the model's."""
    wanted = ("dtype", "param_dtype", "implementation", "decode", "mesh_axes")
    return [field.name for field in dataclasses.fields(template) if field.name in wanted]


class LanguageModel(nn.Module):
    """Tokens [B, T] in, float32 logits [B, T, vocabulary] out.

    With x the residual stream, which begins as the tokens' embeddings:

        x = x + mixer(RMSNorm(x))
        x = x + mlp(RMSNorm(x))                           block by block
        logits = RMSNorm(x) W                             W is the embedding's transpose if tied

    Parameters (`param_dtype`; norms' scales start as ones, the embedding as N(0, 0.02)):

    ===================  ===========  ====================================================
    embed                embedding    [vocabulary, D]
    block_0, block_1...               mixer_norm/scale [D], mixer, mlp_norm/scale [D], mlp
    final_norm           scale        [D]
    head                 kernel       [D, vocabulary], unless the config is `tied`
    ===================  ===========  ====================================================

    With `stacked` the blocks' parameters are under "blocks", with an axis of blocks in front, and
    a scan runs over them: one block is compiled, not all (`jla.models.stack`, `unstack`).

    With `decode` calls continue from the "cache" collection and advance it, as in the layers; see
    `jla.models.empty_cache` and `jla.models.generate`.

    Example:
      layer = jla.models.Layer(jla.linen.KimiDeltaAttention(num_heads=4), jla.models.SwiGLU(128))
      model = jla.models.LanguageModel(jla.models.Config(256, width=64, layers=(layer,) * 2))
      tokens = jnp.zeros((2, 8), jnp.int32)
      params = model.init(jax.random.key(0), tokens)["params"]
      logits = model.apply({"params": params}, tokens)  # [2, 8, 256]

    Attributes:
      config: a `jla.models.Config`.
      dtype: what the layers compute in; norms, softmax and recurrent states are float32.
      param_dtype: of the parameters, but for those that are always float32.
      implementation: of jla's mixers, as they have it; the parameters are the same for all.
      decode: whether there is a cache.
      stacked: whether the blocks, which must have equal templates, are run by a scan.
      unroll: whether the scan's blocks are compiled one by one all the same: slower to compile, but
        what is kept for the backward pass stays where it is, and is not copied to and from a stack.
      remat: which results of a block are kept for its backward pass, a policy of `jax.checkpoint`
        such as `jla.models.kept`; None keeps all.
      mesh_axes: of the norms, and of the mixers and MLPs that have such a field; see the layers.
        The tokens are whole. A clone with None decodes.
      gather: makes a block's parameters (a dict with "params") whole where it runs, and again in
        its backward pass if there is `remat`; None for parameters that are whole. Inside
        `jax.shard_map`, with parameters split over devices; examples/devices.py has one.
    """

    config: Config
    dtype: Dtype = f32
    param_dtype: Dtype = f32
    implementation: Implementation | None = None
    decode: bool = False
    stacked: bool = False
    unroll: bool = False
    remat: Callable[..., bool] | None = None
    mesh_axes: Mapping[str, Names] | None = None
    gather: Callable[[Any], Any] | None = None

    @nn.compact
    @checks.named
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        slots: jax.Array | None = None,
        last_only: bool = False,
    ) -> jax.Array:
        """The logits of every token's successor.

        Args:
          tokens: integers [B, T], 0 to vocabulary - 1.
          mask: bool [B, T], True at real tokens; padding may be anywhere in a row. The logits of
            padding mean nothing.
          segment_ids: integers [B, T]: equal neighbours are one segment, as in the layers.
          slots: int32 [B], with `decode`: the rows of the cache, a pool, that the rows of tokens go
            on from, as in the layers; -1 is a row without a sequence, whose logits mean nothing.
            Or int32 [B, N], with segment_ids 0 to N - 1: those of each row's segments.
          last_only: whether only the logits of each row's last real token are wanted, [B, 1,
            vocabulary]: those of a whole prompt take vocabulary * T * 4 bytes a row. With slots
            [B, N], of each segment's last token, [B, N, vocabulary]; those of a segment that is
            absent mean nothing.

        Raises:
          TypeError, ValueError: arguments of other types or shapes; a template that sets what the
            model sets; `stacked` with layers that differ, or with `decode`; and what the layers
            raise.
        """
        self._check(tokens, mask, slots)
        config, dtypes = self.config, self._dtypes()
        embed = nn.Embed(
            config.vocabulary, config.width, embedding_init=weight_init, name="embed", **dtypes
        )
        split, table = _arguments.split_of(self), embed.embedding
        if split is None:  # else devices sum its gradient, before the cast
            table = table.astype(dtypes["dtype"])
        x = self._embedded(table, tokens)
        stream = self._blocks((x, jnp.zeros_like(x)), mask, segment_ids, slots)
        if last_only:
            if slots is not None and slots.ndim == 2:
                stream = tuple(last_of_segments(x, mask, segment_ids, slots) for x in stream)
            else:
                stream = tuple(last_token(x, mask) for x in stream)
        norm = RMSNorm(
            config.norm_epsilon,
            param_dtype=dtypes["param_dtype"],
            implementation=norms_implementation(self.implementation),
            mesh_axes=self.mesh_axes,
            name="final_norm",
        )
        x, _ = norm.branch(*stream)
        if config.tied:
            return dot(x, table, (((2,), (1,)), ((), ()))).astype(f32)
        head = dense(split, config.vocabulary, kind=nn.Dense, name="head", **dtypes)
        return head(x).astype(f32)

    def _dtypes(self) -> dict[str, Any]:
        return dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))

    def _check(self, tokens, mask, slots):
        if not isinstance(self.config, Config):
            raise TypeError(f"config must be a jla.models.Config, got {self.config!r}")
        for name, dtype in self._dtypes().items():
            checks.check_float_dtype(name, dtype)
        checks.check_implementation(self.implementation)
        checks.check_shapes(
            tokens=(tokens, "B T"), **{} if mask is None else dict(mask=(mask, "B T"))
        )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype.name}")
        if mask is not None:
            checks.check_dtype("mask", mask, [bool])
        if slots is not None and not self.decode:
            raise ValueError("slots need decode=True, got False: they are rows of a cache")
        layers = self.config.layers
        for i, layer in enumerate(layers):
            for name in ("mixer", "mlp"):
                self._check_template(f"config.layers[{i}].{name}", getattr(layer, name))
        if not self.stacked:
            return
        if self.decode:
            # A scan would copy all of a stacked cache for every token.
            raise ValueError(
                "decode=True needs stacked=False, got True; jla.models.unstack(params) makes the "
                "parameters for it"
            )
        for i, layer in enumerate(layers):
            for name in ("mixer", "mlp"):
                one, other = getattr(layers[0], name), getattr(layer, name)
                if one != other:
                    raise ValueError(
                        f"stacked=True needs equal layers, but config.layers[{i}].{name} is "
                        f"{described(other)} and config.layers[0].{name} is {described(one)}; "
                        "use stacked=False"
                    )

    def _check_template(self, name, template):
        """Raises ValueError if a template sets what the model sets, to something else."""
        defaults = {field.name: field.default for field in dataclasses.fields(template)}
        for field in shared_fields(template):
            ours, theirs = getattr(self, field), getattr(template, field)
            if "dtype" in field and theirs is not None:
                ours, theirs = jnp.dtype(ours), jnp.dtype(theirs)
            if theirs != ours and getattr(template, field) != defaults[field]:
                raise ValueError(
                    f"{name} has {field}={theirs}, but the model, which sets it for all layers, "
                    f"has {ours}; leave the template's {field} out"
                )

    def _embedded(self, table, tokens):
        dtype = jnp.dtype(self.dtype)
        if self.config.vocabulary > SMALL_VOCABULARY or self.decode:
            return jnp.take(table, tokens, axis=0).astype(dtype)
        # As a product, for its gradient: adding up rows by few indices is slow on a GPU.
        one_hot = jax.nn.one_hot(tokens, self.config.vocabulary, dtype=dtype)
        return dot(one_hot, table, (((2,), (0,)), ((), ())))

    def _blocks(self, stream, mask, segment_ids, slots):
        """The stream behind all blocks, and what is still to be added to it."""
        layers = self.config.layers
        settings: dict[str, Any] = dict(
            norm_epsilon=self.config.norm_epsilon,
            implementation=self.implementation,
            decode=self.decode,
            mesh_axes=self.mesh_axes,
            **self._dtypes(),
        )
        block = Block
        if self.gather is not None and not self.is_initializing():
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        if self.remat is not None and not self.decode:
            prevent_cse = self.unroll or not self.stacked
            block = nn.remat(block, policy=self.remat, prevent_cse=prevent_cse)
            # On a mesh they cast by themselves: devices sum the gradients of what is cast.
            if not self.is_initializing() and self.mesh_axes is None:
                # Layers would cast their matrices too, but inside of what the backward pass runs
                # again: it would have copies of the parameters as they are, float32.
                cast = functools.partial(cast_matrices, dtype=settings["dtype"])
                block = nn.map_variables(block, "params", trans_in_fn=cast)
        if not self.stacked:
            for i, layer in enumerate(layers):
                one = block(layer, **settings, name=f"block_{i}")
                stream, _ = one(stream, mask, segment_ids, slots)
            return stream
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=len(layers),
            unroll=len(layers) if self.unroll else 1,
        )
        stream, _ = blocks(layers[0], **settings, name="blocks")(stream, mask, segment_ids)
        return stream


def described(template: nn.Module) -> str:
    """A template and its fields that are not the defaults, in one line."""
    fields = [
        field for field in dataclasses.fields(template) if field.name not in ("parent", "name")
    ]
    changed = [
        f"{field.name}={getattr(template, field.name)!r}"
        for field in fields
        if getattr(template, field.name) != field.default
    ]
    return f"{type(template).__name__}({', '.join(changed)})"


def last_token(x, mask):
    """The last real token of each row of x [B, T, D], [B, 1, D]."""
    if mask is None:
        return x[:, -1:]
    T = x.shape[1]
    last = T - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1, mode="promise_in_bounds")


def last_of_segments(x, mask, segment_ids, slots):
    """The last real token of each segment of x [B, T, D], [B, N, D]; the first of the row for a
    segment that is absent."""
    T, N = x.shape[1], slots.shape[1]
    owner = packed.owners(segment_ids, N)
    mine = owner[..., None] == jnp.arange(N, dtype=jnp.int32)[None, None]
    if mask is not None:
        mine = mine & mask[..., None]
    place = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    last = jnp.max(jnp.where(mine, place, 0), axis=1)
    return jnp.take_along_axis(x, last[..., None], axis=1, mode="promise_in_bounds")
