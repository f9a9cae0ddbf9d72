"""A byte-level language model in flax.linen, with the sequence mixer chosen by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from text import VOCABULARY

from jla.linen import (
    GatedSlotAttention,
    KimiDeltaAttention,
    LogLinearMamba2,
    MesaNet,
    PaTHAttention,
)

weight_init = nn.initializers.normal(0.02)


class CausalAttention(nn.Module):
    """Softmax attention with rotary positions, the usual yardstick."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    decode: bool = False

    @nn.compact
    def __call__(self, x):
        _, T, width = x.shape
        dense = functools.partial(
            nn.DenseGeneral, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        heads = (self.num_heads, self.head_dim)
        q, k, v = (dense(heads, name=name)(x) for name in ("query", "key", "value"))
        if not self.decode:
            q, k = rotate(q, jnp.arange(T)), rotate(k, jnp.arange(T))
            o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            # As in nn.MultiHeadDotProductAttention, init's input gives the cache its length.
            begun = self.has_variable("cache", "cache_index")
            keys = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
            values = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
            index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            position = index.value + jnp.arange(T)
            q, k = rotate(q, position), rotate(k, position)
            if begun:
                keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, index.value, 1)
                values.value = lax.dynamic_update_slice_in_dim(values.value, v, index.value, 1)
                index.value += T
            visible = jnp.arange(keys.value.shape[1]) <= position[:, None]
            o = jax.nn.dot_product_attention(q, keys.value, values.value, mask=visible[None, None])
        return dense(width, axis=(-2, -1), name="out")(o)


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
    "gsa": lambda model, **common: GatedSlotAttention(
        implementation=model.implementation, **common
    ),
    "log_linear": lambda model, **common: LogLinearMamba2(
        implementation=model.implementation, **common
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
        gate = nn.silu(dense(hidden, name="gate")(x))
        return dense(width, name="down")(gate * dense(hidden, name="up")(x))


class Block(nn.Module):
    """The two residual branches of a layer, each behind an RMSNorm."""

    model: "LanguageModel"

    @nn.compact
    def __call__(self, x, _):
        model = self.model
        dtypes = dict(dtype=jnp.dtype(model.dtype), param_dtype=jnp.dtype(model.param_dtype))
        mixer = MIXERS[model.mixer](
            model,
            num_heads=model.heads,
            head_dim=model.width // model.heads,
            decode=model.decode,
            name="mixer",
            **dtypes,
        )
        x = x + mixer(nn.RMSNorm(name="mixer_norm", **dtypes)(x))
        x = x + SwiGLU(name="mlp", **dtypes)(nn.RMSNorm(name="mlp_norm", **dtypes)(x))
        return x, None


class LanguageModel(nn.Module):
    """Bytes [B, T] in, float32 logits [B, T, 256] of every next byte out.

    Attributes:
      mixer: a name in MIXERS.
      width, depth, heads: the model's size; a head has width // heads dimensions.
      dtype: what the layers compute in; norms, softmax and recurrent states are float32.
      param_dtype: what the parameters are kept in.
      implementation: of jla's mixers; the parameters are the same for all.
      decode: whether calls continue from the `cache` collection (see `generate.empty_cache`).
    """

    mixer: str
    width: int
    depth: int
    heads: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    implementation: str | None = None
    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        dtypes = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        embed = nn.Embed(VOCABULARY, self.width, embedding_init=weight_init, name="embed", **dtypes)
        # A scan over the blocks, whose parameters are stacked: one block is compiled, not `depth`.
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = blocks(self.clone(parent=None), name="blocks")(embed(tokens), None)
        x = nn.RMSNorm(name="final_norm", **dtypes)(x)
        return embed.attend(x).astype(jnp.float32)
