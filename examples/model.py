"""A byte-level language model in flax.linen, with the sequence mixer chosen by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from text import VOCABULARY

from jla.linen import (
    GatedSlotAttention,
    KimiDeltaAttention,
    LogLinearMamba2,
    MesaNet,
    PaTHAttention,
    RMSNorm,
)

weight_init = nn.initializers.normal(0.02)


def norms_implementation(implementation):
    """That of the norms beside a mixer of this one: they choose by themselves beside kernels, which
    need not serve the norms too (of one token, for example)."""
    return implementation if implementation in ("reference", "xla") else None


class CausalAttention(nn.Module):
    """Softmax attention with rotary positions, the usual yardstick.

    With `decode`, init's input gives the cache its length, as in nn.MultiHeadDotProductAttention.
    A call of several tokens begins the cache, those of one token go on from it; several tokens
    after others give NaN.
    """

    num_heads: int
    key_dim: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    decode: bool = False

    @nn.compact
    def __call__(self, x):
        B, T, width = x.shape
        dense = functools.partial(
            nn.DenseGeneral, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        heads = (self.num_heads, self.key_dim)
        q, k, v = (dense(heads, name=name)(x) for name in ("query", "key", "value"))
        if not self.decode:
            o = causal_attention(rotate(q, jnp.arange(T)), rotate(k, jnp.arange(T)), v)
        else:
            begun = self.has_variable("cache", "cache_index")
            # Heads before tokens: what one query reads of a head lies in one piece.
            shape = (B, self.num_heads, T, self.key_dim)
            keys = self.variable("cache", "cached_key", jnp.zeros, shape, k.dtype)
            values = self.variable("cache", "cached_value", jnp.zeros, shape, v.dtype)
            index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            start = index.value
            position = start + jnp.arange(T)
            q, k = rotate(q, position), rotate(k, position)
            if begun:
                for cached, new in ((keys, k), (values, v)):
                    new = jnp.swapaxes(new, 1, 2)
                    cached.value = lax.dynamic_update_slice_in_dim(cached.value, new, start, 2)
                index.value += T
            if T == 1:
                o = attention_to_cache(q, keys.value, values.value, start + 1)
            else:
                o = jnp.where(start == 0, causal_attention(q, k, v), jnp.nan)
        return dense(width, axis=(-2, -1), name="out")(o)


def causal_attention(q, k, v):
    """Attention of all to their past: in 16 bits on a GPU cuDNN's, which raises what it cannot do;
    else XLA's, which makes the whole square of logits."""
    cudnn = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    implementation = "cudnn" if cudnn else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def attention_to_cache(q, keys, values, length):
    """Attention of one query [B, 1, H, D] to the first `length` of the keys [B, H, S, D].

    The products are written as sums, in float32: XLA then reads keys and values once, as they lie,
    where matrix products with a single row would have them copied or leave most of a GPU idle.
    """
    f32 = jnp.float32
    query = q[:, 0, :, None].astype(f32) * q.shape[-1] ** -0.5
    logits = jnp.sum(query * keys.astype(f32), axis=-1)
    seen = jnp.arange(keys.shape[2]) < length
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.sum(weights[..., None] * values.astype(f32), axis=2)[:, None].astype(q.dtype)


def rotate(x, position):
    """Rotary position embedding (arXiv 2104.09864) of x [B, T, H, D] at the positions [T]."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# What a block can mix its tokens with, made from the model's settings and those that all mixers
# share. To try another, add a line: any module that maps [B, T, width] to the same shape, and goes
# on from a `cache` when decoding, will do.
MIXERS = {
    "kda": lambda model, **common: KimiDeltaAttention(
        implementation=model.implementation, **common
    ),
    # With short convolutions, as the other linear mixers have them: without, two layers cannot tell
    # which value follows which key.
    "gsa": lambda model, **common: GatedSlotAttention(
        implementation=model.implementation, conv_size=4, **common
    ),
    # Without biases, as the others.
    "log_linear": lambda model, **common: LogLinearMamba2(
        implementation=model.implementation,
        use_bias=False,
        num_levels=(model.longest - 1).bit_length() + 1,
        **common,
    ),
    "mesa": lambda model, **common: MesaNet(implementation=model.implementation, **common),
    "path": lambda model, **common: PaTHAttention(implementation=model.implementation, **common),
    "attention": lambda model, **common: CausalAttention(**common),
}


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202), about 8/3 as wide inside as outside."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = 32 * round(width * 8 / 3 / 32)
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        y = nn.silu(dense(hidden, name="gate")(x)) * dense(hidden, name="up")(x)
        return dense(width, name="down")(checkpoint_name(y, "hidden"))


class Block(nn.Module):
    """The two residual branches of a layer, each behind an RMSNorm.

    Takes and returns the stream and what is still to be added to it, which the next norm does.
    """

    model: "LanguageModel"

    @nn.compact
    def __call__(self, stream, _):
        model = self.model
        dtypes = dict(dtype=jnp.dtype(model.dtype), param_dtype=jnp.dtype(model.param_dtype))
        mixer = MIXERS[model.mixer](
            model,
            num_heads=model.heads,
            key_dim=model.width // model.heads,
            decode=model.decode,
            name="mixer",
            **dtypes,
        )
        norm = functools.partial(
            RMSNorm,
            param_dtype=dtypes["param_dtype"],
            implementation=norms_implementation(model.implementation),
        )
        # `branch`, not nn.RMSNorm: on a GPU one kernel adds and normalises, and one makes the
        # norm's gradient and adds that of the stream, which XLA would do in five passes.
        y, x = norm(name="mixer_norm").branch(*stream)
        y, x = norm(name="mlp_norm").branch(x, mixer(y))
        return (x, SwiGLU(name="mlp", **dtypes)(y)), None


def kept(primitive, *_, **parameters):
    """Which results of a block its backward pass takes as they were: products' and kernels', what
    goes into the last product, and the stream before its branches.

    All else (convolutions, gates, norms of heads) is made again from these. A scan over blocks
    would write it to memory, most of it in float32, and read it back, which takes longer.
    """
    return parameters.get("name") in ("residual_stream", "hidden") or primitive.name in (
        "dot_general",
        "custom_vmap_call",  # jla's kernels
        "dot_product_attention_fwd_wrapper",  # cuDNN's attention
    )


def cast_kernels(params, dtype):
    """Parameters with the kernels of matrix products in the dtype that they are multiplied in.

    Their layers would cast them, too, but inside of what the backward pass runs again: it would
    have copies of the parameters as they are, float32.
    """

    def cast(path, x):
        of_product = path[-1].key == "kernel" and not path[-2].key.endswith("conv1d")
        return x.astype(dtype) if of_product else x

    return jax.tree_util.tree_map_with_path(cast, params)


class LanguageModel(nn.Module):
    """Tokens [B, T] in, float32 logits [B, T, vocabulary] out.

    The blocks' parameters are stacked under "blocks". With `decode` each block has its parameters
    and its cache under a name of its own, "block_0" and so on (`generate.decoder_params`).

    Attributes:
      mixer: a name in MIXERS.
      width, depth, heads: the model's size; a head has width // heads dimensions.
      dtype: what the layers compute in; norms, softmax and recurrent states are float32.
      param_dtype: what the parameters are kept in.
      implementation: of jla's mixers; the parameters are the same for all.
      unroll: whether the blocks are compiled one by one, not as a loop: slower to compile, but what
        is kept for the backward pass stays where it is, and is not copied to and from a stack.
      longest: the most tokens in a sequence, for log-linear attention, which has parameters for
        each of its levels.
      vocabulary: how many tokens there are; 256, the bytes, unless told otherwise.
      decode: whether calls continue from the `cache` collection (see `generate.empty_cache`).
    """

    mixer: str
    width: int
    depth: int
    heads: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    implementation: str | None = None
    unroll: bool = False
    longest: int = 2**14
    vocabulary: int = VOCABULARY
    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        dtypes = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        embed = nn.Embed(
            self.vocabulary, self.width, embedding_init=weight_init, name="embed", **dtypes
        )
        # As a product, for its gradient: adding up rows by few indices is slow on a GPU.
        one_hot = jax.nn.one_hot(tokens, self.vocabulary, dtype=dtypes["dtype"])
        x = one_hot @ embed.embedding.astype(dtypes["dtype"])
        stream = x, jnp.zeros_like(x)
        settings = self.clone(parent=None)
        if self.decode:
            # Apart, for a scan over blocks would copy all of a stacked cache for every token.
            for i in range(self.depth):
                stream, _ = Block(settings, name=f"block_{i}")(stream, None)
        else:
            # A scan over the blocks: one is compiled, not `depth`.
            block = nn.remat(Block, policy=kept, prevent_cse=self.unroll)
            if not self.is_initializing():
                cast = functools.partial(cast_kernels, dtype=dtypes["dtype"])
                block = nn.map_variables(block, "params", trans_in_fn=cast)
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                unroll=self.depth if self.unroll else 1,
            )
            stream, _ = blocks(settings, name="blocks")(stream, None)
        norm = RMSNorm(
            param_dtype=dtypes["param_dtype"],
            implementation=norms_implementation(self.implementation),
            name="final_norm",
        )
        x, _ = norm.branch(*stream)
        return embed.attend(x).astype(jnp.float32)
