"""What the steps of kernels share, whatever the mechanism."""

import jax

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
