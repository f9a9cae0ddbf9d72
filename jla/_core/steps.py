"""What the steps of kernels share, whatever the mechanism."""

import jax

from jla._core.axes import letters
from jla._core.pools import of_pool
from jla._core.shardwise import shardwise


def by_slots(formula):
    """A formula of steps in plain JAX, whose last operand is the slots."""
    return lambda *arrays, **options: formula(*arrays[:-1], slots=arrays[-1], **options)


def differentiable(run, formula, operands, results):
    """A step of kernels: run shard by shard, its derivatives those of a formula in XLA.

    Args:
      run, formula: functions of the same arrays that return a tuple of arrays; settings are in a
        functools.partial.
      operands, results: as of `shardwise`.
    """
    step = jax.custom_jvp(lambda *arrays: shardwise(run, operands, results)(*arrays))

    @step.defjvp
    def _(primals, tangents):
        return step(*primals), jax.jvp(formula, primals, tangents)[1]

    return step


def call(run, formula, axes, operands, results, *arrays, slots=None):
    """A step of kernels, see `differentiable`; with slots, on a pool of states.

    Args:
      run, formula: take `slots` behind the arrays, the formula by name.
      axes: a step's. operands, results: names in it, with spaces between them.
    """
    if slots is not None:
        formula, arrays = by_slots(formula), (*arrays, slots)
        axes, operands = of_pool(axes), f"{operands} slots"
    return differentiable(run, formula, letters(axes, operands), letters(axes, results))(*arrays)
