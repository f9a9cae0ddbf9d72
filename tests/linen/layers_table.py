"""What an entry of the layers' tables says: a layer, its cases, and what is expected of them."""

import dataclasses
from collections.abc import Callable, Mapping

from flax import linen as nn

D = 24  # features of the inputs, and of the outputs
CAPACITY = 40  # tokens that a cache holds, where it has a capacity

type Shapes = Mapping[str, object]  # a tree of shapes, by names


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    name, module: of the layer.
    cases: name to the module's attributes; "plain" is the simplest, "rich" has grouped heads of
      unequal sizes and convolutions of 4 taps.
    definition: (attributes, float64 parameters, x [T, D]) to the output and the cache of one row.
    centre: the mean of random parameters of a name, where it is not 0.
    parameters, cache: the shapes that "rich" has; the cache's for two rows, and three tokens.
    cache_dtypes: of what in the cache is not float32 when the layer computes in bfloat16, the
      convolutions' inputs aside.
    defaults: the shapes of kernels from 64 inputs and two heads, where nothing else is set.
    float32_parameters: those that `param_dtype` does not touch.
    mistakes: (attributes beside plain's, exception, pattern of its message).
    differentiated: the cases in which the gradient reaches every parameter, and is finite.
    padded: the cases that are run with every kind of mask and with segments: one with convolutions
      and, where that is another program, one without.
    longest: the most tokens that the cases' levels or caches hold; None for any number.
    size_for_kernels: attributes, beside heads of 64 features, without which kernels refuse "rich".
    kernels: whether the mechanism has GPU kernels.
    slow: the tests that show what those of another layer do.
    """

    name: str
    module: type[nn.Module]
    cases: Mapping[str, Mapping[str, object]]
    definition: Callable
    parameters: Shapes
    cache: Shapes
    mistakes: tuple
    differentiated: tuple[str, ...]
    centre: Mapping[str, float]
    padded: tuple[str, ...] = ("rich",)
    cache_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {
            "q_proj": (64, 2, 32),
            "v_proj": (64, 2, 32),
            "o_proj": (2, 32, 64),
        }
    )
    float32_parameters: tuple[str, ...] = ()
    longest: int | None = None
    size_for_kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kernels: bool = True
    slow: tuple[str, ...] = ()
