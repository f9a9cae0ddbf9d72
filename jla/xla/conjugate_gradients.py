"""Conjugate gradients for many small systems at once, one for each row of the last axis."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

SOLUTION = "solution"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def solve(times, steps, tolerance, matrix, diagonal, b):
    """Solves A x = b for every row of b [..., K], A symmetric and positive definite.

    Differentiable in A and b, by the implicit function theorem: forward and backward solve once
    more with the same A. A checkpoint can keep the solution by the name `SOLUTION`.

    Args:
      times: `times(matrix, x)` is A x, a linear function of each.
      steps: the most iterations.
      tolerance: a row stops when its residual r has r^T D^-1 r <= tolerance^2 b^T D^-1 b, with D
        the preconditioner.
      matrix: a tree of arrays that `times` takes.
      diagonal: the diagonal of the preconditioner, positive; it broadcasts against b.
      b: [..., K].

    Returns:
      x, of b's shape; NaN in rows where b or the preconditioner is.
    """
    return _iterate(functools.partial(times, matrix), steps, tolerance, diagonal, b)


@solve.defjvp
def _solve_jvp(times, steps, tolerance, primals, tangents):
    """A dx = db - dA x."""
    (matrix, diagonal, b), (d_matrix, _, db) = primals, tangents
    x = checkpoint_name(solve(times, steps, tolerance, matrix, diagonal, b), SOLUTION)
    _, change = jax.jvp(lambda matrix: times(matrix, x), (matrix,), (d_matrix,))

    def iterate(times, b):
        return _iterate(times, steps, tolerance, diagonal, b)

    times = functools.partial(times, matrix)
    return x, lax.custom_linear_solve(times, db - change, iterate, symmetric=True)


def _iterate(times, steps, tolerance, diagonal, b):
    """Conjugate gradients from zero. The loop ends when all rows have stopped."""
    # A row is scaled by its largest element: squares of small gradients would vanish in float32.
    largest = jnp.max(jnp.abs(b), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    inverse = 1 / diagonal

    def dot(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    def going(carry):
        step, active = carry[:2]
        return (step < steps) & jnp.any(active)

    def iteration(carry):
        step, active, x, residual, direction, square = carry
        image = times(direction)
        # A row that has stopped moves by zero, to the bit; nothing is divided by its zeros.
        length = jnp.where(active, square / jnp.where(active, dot(direction, image), 1.0), 0.0)
        x = x + length * direction
        residual = residual - length * image
        z = inverse * residual
        after = dot(residual, z)
        turn = jnp.where(active, after / jnp.where(active, square, 1.0), 0.0)
        active = active & (after > enough)
        return step + 1, active, x, residual, z + turn * direction, after

    residual = b / scale
    direction = inverse * residual
    square = dot(residual, direction)
    enough = tolerance**2 * square
    # Zeros with its sharding, or NaN where it is NaN: such a row has stopped before it starts.
    x = direction - direction
    carry = lax.while_loop(going, iteration, (0, square > enough, x, residual, direction, square))
    return scale * carry[2]
