"""What a language model is made of: its layers' templates, its sizes and its norms' epsilon."""

import dataclasses

from flax import linen as nn

from jla._core import checks


# Plain dataclasses: flax would adopt the modules in a tuple or a dict, but not those in here.
@dataclasses.dataclass(frozen=True)
class Layer:
    """What one block of a model computes, as templates: modules that are in no other module.

    A block clones them, with the model's dtypes, implementation and `decode`; so these fields of
    a template stay as they are by default. A mixer is called `mixer(x, mask=mask,
    segment_ids=segment_ids)`, an MLP `mlp(x)`; both map [B, T, D] to [B, T, D].

    Example:
      mixer = jla.linen.KimiDeltaAttention(num_heads=4, key_dim=16)
      layer = jla.models.Layer(mixer, mlp=jla.models.SwiGLU(hidden=128))

    Attributes:
      mixer: a layer of `jla.linen`, `jla.models.Attention`, or another module that is called so.
      mlp: `jla.models.SwiGLU`, or another module that is called so.

    Raises:
      TypeError: a template is no module.
      ValueError: a template was created inside another module.
    """

    mixer: nn.Module
    mlp: nn.Module

    @checks.named
    def __post_init__(self) -> None:
        for name in ("mixer", "mlp"):
            template = getattr(self, name)
            if not isinstance(template, nn.Module):
                raise TypeError(f"{name} must be a flax.linen.Module, got {template!r}")
            if template.parent is not None:
                raise ValueError(
                    f"{name} must be a module of its own, got {type(template).__name__} inside of "
                    f"{type(template.parent).__name__}; create it outside of other modules, or "
                    "with parent=None"
                )


@dataclasses.dataclass(frozen=True)
class Config:
    """A causal language model, without its parameters' values and dtypes.

    Example:
      layer = jla.models.Layer(jla.models.Attention(num_heads=4), jla.models.SwiGLU(128))
      config = jla.models.Config(vocabulary=256, width=64, layers=(layer,) * 2)

    Attributes:
      vocabulary: how many tokens there are.
      width: D, the features of the residual stream.
      layers: a `Layer` for each block, in a tuple, so that a config can be hashed.
      norm_epsilon: of the blocks' norms and of the last norm. A mixer's own is its template's.
      tied: whether the head's matrix is the embedding's.

    Raises:
      TypeError, ValueError: a field has another type, or a value that is not accepted.
    """

    vocabulary: int
    width: int
    layers: tuple[Layer, ...]
    norm_epsilon: float = 1e-5
    tied: bool = True

    @checks.named
    def __post_init__(self) -> None:
        checks.check_count("vocabulary", self.vocabulary)
        checks.check_count("width", self.width)
        checks.check_positive("norm_epsilon", self.norm_epsilon)
        if not isinstance(self.layers, tuple):
            raise TypeError(f"layers must be a tuple of Layer, got {type(self.layers).__name__}")
        if not self.layers:
            raise ValueError("layers must have at least one Layer, got an empty tuple")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{i}] must be a Layer, got {layer!r}")
        if not isinstance(self.tied, bool):
            raise TypeError(f"tied must be True or False, got {self.tied!r}")
