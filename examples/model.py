"""The examples' language model: jla.models' with bytes for tokens, its mixer chosen by name."""

from text import VOCABULARY

from jla.linen import (
    GatedSlotAttention,
    KimiDeltaAttention,
    LogLinearMamba2,
    MesaNet,
    PaTHAttention,
)
from jla.models import Attention, Config, LanguageModel, Layer, SwiGLU, kept

# What a block can mix its tokens with, made of its heads and of the most tokens in a sequence. To
# try another, add a line: any module that maps [B, T, width] to the same shape, and goes on from a
# `cache` when decoding, will do; see `jla.models.Layer`.
MIXERS = {
    "kda": lambda longest, **heads: KimiDeltaAttention(**heads),
    # With short convolutions, as the other linear mixers have them: without, two layers cannot tell
    # which value follows which key.
    "gsa": lambda longest, **heads: GatedSlotAttention(conv_size=4, **heads),
    # Without biases, as the others. It has parameters for each of its levels.
    "log_linear": lambda longest, **heads: LogLinearMamba2(
        use_bias=False, num_levels=(longest - 1).bit_length() + 1, **heads
    ),
    "mesa": lambda longest, **heads: MesaNet(**heads),
    "path": lambda longest, **heads: PaTHAttention(**heads),
    "attention": lambda longest, **heads: Attention(**heads),
}


def make_model(
    mixer, width, depth, heads, *, longest=2**14, vocabulary=VOCABULARY, axis_name=None, **settings
):
    """A LanguageModel of equal blocks, for training: stacked, and keeping little of each block.

    Args:
      mixer: a name in MIXERS.
      width, depth, heads: the model's size; a head has width // heads dimensions.
      longest: the most tokens in a sequence.
      vocabulary: how many tokens there are.
      axis_name: inside `jax.shard_map`, the axis of the mesh that splits time; None for none.
      settings: fields of LanguageModel, such as dtype, implementation and unroll.
    """
    sizes = dict(num_heads=heads, key_dim=width // heads)
    if axis_name is not None:
        sizes["axis_name"] = axis_name
    template = MIXERS[mixer](longest, **sizes)
    # About 8/3 as wide inside as outside.
    layer = Layer(template, SwiGLU(hidden=32 * round(width * 8 / 3 / 32)))
    config = Config(vocabulary, width, layers=(layer,) * depth, norm_epsilon=1e-6)
    return LanguageModel(config, stacked=True, remat=kept, **settings)
