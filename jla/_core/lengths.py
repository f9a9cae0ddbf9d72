"""Lengths that are known, and those that `jax.export` leaves open."""

from jax.export import is_symbolic_dim

__all__ = ["chunk_size", "is_symbolic_dim"]


def chunk_size(T: int, most: int, least: int = 2) -> int:
    """The power of two that holds T tokens, `least` to `most`; `most` where T is symbolic."""
    if is_symbolic_dim(T):
        return most
    return min(most, max(least, 1 << (T - 1).bit_length()))
