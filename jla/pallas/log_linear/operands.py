"""The arrays of log-linear attention's kernels by name, and functions of them shard by shard."""

import functools

import jax.numpy as jnp

from jla._core.axes import LOG_LINEAR, with_value_heads
from jla._core.shardwise import shardwise
from jla.pallas.common.chunks import TILE_WIDTH
from jla.pallas.common.padding import missing_tokens, pad

bf16, f32 = jnp.bfloat16, jnp.float32

_GIVEN = with_value_heads(LOG_LINEAR)
_AXES = dict(
    **dict(q=_GIVEN["q"], k=_GIVEN["k"], v=_GIVEN["v"], do=_GIVEN["o"], of_head="B T HV K"),
    **dict(w="B HV N P C", decays="B HV n", skip="B single HV number"),
    **dict(states="B HV n V K", live="B N"),
    # Over devices: their states and which chunks read them; the root's, and sums of jobs.
    **dict(others="B HV I V K", reads="B HV N", state="B HV V K", droot="B HV V K"),
    **dict(read="B HV J V K", jobs="B HV J V K"),
)


def by_shards(function, results, arrays, **options):
    """Calls the function, shard by shard, with those arrays by their names that are not None.

    Args:
      function: of arrays by name and the options, returns a tuple. results: their names.
    """
    present = {name: x for name, x in arrays.items() if x is not None}
    run = functools.partial(_named, function, tuple(present), **options)
    inputs, results = ([_AXES[name] for name in names] for names in (present, results))
    return shardwise(run, inputs, results)(*present.values())


def _named(function, names, *arrays, **options):
    return function(**dict(zip(names, arrays, strict=True)), **options)


def whole_tiles(x):
    """Tokens [B, T, heads, features], bf16, padded with zeros to tiles of the kernels."""
    tokens = missing_tokens(x.shape[1])
    return pad(x.astype(bf16), tokens=tokens, features=-x.shape[3] % TILE_WIDTH)


def over_group(x, q):
    """The sum over the heads of each key head, of gradients of each head; in q's shape."""
    if x.shape == q.shape:
        return x
    return x.astype(f32).reshape(*q.shape[:3], -1, q.shape[3]).sum(3).astype(bf16)
