"""The models that benchmarks.quality trains: by name, with changed settings, of equal size."""

import ast
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.side_by_side import HYBRID, MIXERS, initial_params, size
from jla.models import Config, LanguageModel, Layer, SwiGLU, kept

MODELS = {**{name: (name,) for name in MIXERS}, "hybrid": HYBRID}
INIT = "init_"  # before a parameter's name
MULTIPLE = 64  # of which MLPs are wide: the sizes that matrix products like


class Shifted(nn.Module):
    """A mixer that sees, of half of its input's features, those of the token before: what a short
    convolution shows to queries, keys and values, without any parameters.

    Attributes:
      make: makes the mixer, of its settings.
      the others: as of the layers of `jla.linen`.
    """

    make: Callable[..., nn.Module]
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    mesh_axes: Mapping | None = None

    @nn.compact
    def __call__(self, x, *, mask=None, segment_ids=None):
        own, before = jnp.split(x, 2, axis=-1)
        before = jnp.pad(before, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = jnp.concatenate([own, before], axis=-1)
        inner = self.make()
        fields = {field.name for field in dataclasses.fields(inner)}
        shared = ("dtype", "param_dtype", "implementation", "mesh_axes")
        settings = {name: getattr(self, name) for name in shared if name in fields}
        inner = inner.clone(parent=self, name="mixer", **settings)
        return inner(x, mask=mask, segment_ids=segment_ids)


def parsed(name):
    """A model's mixers and their settings: "gsa:scale=4" is (("gsa",), {"scale": 4}), and
    "log_linear:init_D=0.0" begins with the parameter D at zero.

    Raises:
      ValueError: an unknown mixer, or a setting that is no `field=value`.
    """
    first, *settings = name.split(":")
    if first not in MODELS:
        raise ValueError(f"unknown model {first!r}; known: {', '.join(MODELS)}")
    values = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        try:
            values[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ValueError(f"{name!r}: {setting!r} must be field=value, as scale=4") from None
    return MODELS[first], values


def filled(name, params):
    """Parameters with those that a model's `init_PARAMETER=value` names set to that value."""
    _, settings = parsed(name)

    def changed(path, x):
        value = settings.get(f"{INIT}{path[-1].key}")
        return x if value is None else jnp.full_like(x, value)

    return jax.tree_util.tree_map_with_path(changed, params)


def template(mixer, settings, sizes, longest):
    """A mixer of the examples with other settings; `shift=True` puts it into `Shifted`, and those
    that `filled` takes are left out.

    Raises:
      ValueError: a setting that the mixer does not have.
    """
    settings = {name: x for name, x in settings.items() if not name.startswith(INIT)}
    shift = settings.pop("shift", False)

    def make(**more):
        return MIXERS[mixer](longest, **sizes).clone(**settings, **more)

    fields = {field.name for field in dataclasses.fields(MIXERS[mixer](longest, **sizes))}
    if unknown := sorted(settings.keys() - fields):
        raise ValueError(f"{mixer} has no setting {', '.join(unknown)}")
    return Shifted(make) if shift else make()


def make_model(name, *, width, depth, heads, vocabulary, parameters, longest, **settings):
    """A model of `depth` blocks with about so many parameters, which its MLPs' width decides.

    Args:
      name: see `parsed`.
      width, depth, heads, vocabulary: its sizes; a head has width // heads features.
      parameters: the number that it comes closest to, the embedding counted once.
      longest: the most tokens in a sequence, for mixers that have parameters for their levels.
      settings: fields of LanguageModel, such as dtype and implementation.
    """
    mixers, changed = parsed(name)
    sizes = dict(num_heads=heads, key_dim=width // heads)
    # One template for each kind of block: equal blocks can be stacked.
    templates = {mixer: template(mixer, changed, sizes, longest) for mixer in mixers}
    mixers = [templates[mixers[i % len(mixers)]] for i in range(depth)]
    stacked = len(templates) == 1

    def of(hidden):
        layers = tuple(Layer(mixer, SwiGLU(hidden=hidden)) for mixer in mixers)
        config = Config(vocabulary, width, layers=layers, norm_epsilon=1e-6)
        return LanguageModel(config, stacked=stacked, unroll=stacked, remat=kept, **settings)

    least = count(of(MULTIPLE))
    each = 3 * width * depth * MULTIPLE
    return of(MULTIPLE * (1 + max(0, round((parameters - least) / each))))


def make_params(name, model, seed):
    """Random parameters of the model of this name, built as by `side_by_side.make_params`."""
    reference = model.clone(implementation="reference")
    return filled(name, initial_params(jax.random.key(seed), model=reference))


def count(model):
    """How many parameters a model has."""
    params = functools.partial(initial_params, model=model.clone(implementation="reference"))
    return size(jax.eval_shape(params, jax.random.key(0)))
