"""A leaf of queries, for `forward` and `query_gradients`: its record, and a level's loads."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jla.pallas.common.scratch import fetch
from jla.pallas.path_attention import dyadic, rings
from jla.pallas.path_attention.dyadic import LEAF

ROWS = 64  # queries of one warpgroup; two make a leaf
COMPUTE_REGISTERS, LOADER_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A CTA's leaf of queries: warpgroups 0 and 1 have a half of it each, 2 loads."""

    refs: Any
    b: Any
    head: Any  # of queries
    wg: Any
    number: Any
    scale: float
    queries: rings.Ring
    keys: rings.Ring
    values: rings.Ring

    @property
    def leaves(self):
        """The number of leaves of a row."""
        return self.refs.own.shape[2]

    @property
    def levels(self):
        """The number of levels."""
        return dyadic.number(self.leaves)

    def rows(self, half):
        """The tokens of one half of the leaf."""
        return pl.ds(self.number * LEAF + half * ROWS, ROWS)

    def version_rows(self, m, half):
        """The rows of one half of the leaf's queries of level m."""
        return dyadic.rows(dyadic.query_counts(self.leaves), self.number, m, half)


def leaf_of(refs, scale, *, first_keys=0):
    """The CTA's leaf; `first_keys` is the number of the first tile of keys. Long leaves come first.

    As refs it has those that both kernels have: inputs q, k, v, own, query_gates, key_gates, and
    in SMEM sq, sk, sv, squery_gates, skey_gates, with a barrier `_loaded` and `_used` for each.
    """
    b, head, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
    number = refs.own.shape[2] - 1 - lax.axis_index("leaf")
    queries = rings.Ring(refs.q_loaded, refs.q_used)
    keys = rings.Ring(refs.k_loaded, refs.k_used, first_keys)
    values = rings.Ring(refs.v_loaded, refs.v_used)
    return Leaf(refs, b, head, wg, number, scale, queries, keys, values)


def key_head(leaf, group):
    """The head of keys and values."""
    return lax.div(leaf.head, jnp.int32(group))


def load_queries(leaf, rows, slot):
    """The leaf's queries of a level, rows(half), and their gates, to a slot that is free."""
    refs = leaf.refs
    for half in range(2):
        at = leaf.b, leaf.head, rows(half)
        loads = dict(q=(refs.q.at[*at], refs.sq.at[slot, half]))
        if refs.query_gates is not None:
            loads |= dict(gates=(refs.query_gates.at[*at], refs.squery_gates.at[slot, half]))
        fetch(loads, refs.q_loaded.at[slot], partial=True)


def load_keys(leaf, h, first, i, n):
    """The keys of the i-th leaf from version `first` on, and their gates, as tile n."""
    refs, slot = leaf.refs, leaf.keys.free(n)
    rows = pl.ds((first + i) * LEAF, LEAF)
    loads = dict(k=(refs.k.at[leaf.b, h, rows], refs.sk.at[slot]))
    if refs.key_gates is not None:
        loads |= dict(gates=(refs.key_gates.at[leaf.b, leaf.head, rows], refs.skey_gates.at[slot]))
    fetch(loads, refs.k_loaded.at[slot])


def load_values(leaf, h, number, n):
    """The values of leaf `number`, as tile n."""
    refs = leaf.refs
    slot, rows = leaf.values.slot(n), pl.ds(number * LEAF, LEAF)
    leaf.values.reuse(n, slot)
    fetch(dict(v=(refs.v.at[leaf.b, rows, h], refs.sv.at[slot])), refs.v_loaded.at[slot])
