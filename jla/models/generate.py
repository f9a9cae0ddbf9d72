"""Decoding: the cache, prefill and sampling, and blocks' parameters stacked or one by one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jla._core import checks
from jla._core.types import Array
from jla.models.language_model import LanguageModel, cast_matrices

type Tree = Any  # of arrays, in dicts

# For the compiler, of a program that reads prompts: no CUDA graphs. A graph is made anew where a
# call's arrays lie elsewhere than those of the call before, as a prompt's results do. The GPU then
# waits longer than for kernels that are started one by one. What draws tokens needs graphs.
READING: dict[str, str | int] = {
    "xla_gpu_enable_command_buffer": "",
    "xla_gpu_graph_min_graph_size": 2**30,
}


@checks.named
def stack(params: Tree) -> Tree:
    """Parameters of a model with stacked=True, from those of one with stacked=False.

    Example:
      params = {"block_0": {"w": jnp.ones((3, 4))}, "block_1": {"w": jnp.ones((3, 4))}}
      w = jla.models.stack(params)["blocks"]["w"]  # [2, 3, 4]

    Args:
      params: a dict with "block_0", "block_1" and so on, which have the same structure and shapes,
        and whatever else, which stays.

    Raises:
      ValueError: there are no blocks, one is missing, or two differ.
    """
    names = [name for name in params if name.startswith("block_")]
    wanted = [f"block_{i}" for i in range(len(names))]
    if not names or set(names) != set(wanted):
        raise ValueError(
            f"params must have the blocks block_0, block_1, ... without a gap, got {sorted(params)}"
        )

    def shapes(name):
        leaves = jax.tree_util.tree_leaves_with_path(params[name])
        return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in leaves}

    for name in wanted[1:]:
        first, other = shapes("block_0"), shapes(name)
        for path in {**first, **other}:
            if first.get(path) != other.get(path):
                raise ValueError(
                    f"only equal blocks can be stacked, but {name}{path} has shape and dtype "
                    f"{other.get(path)}, and block_0{path} has {first.get(path)}"
                )
    rest = {name: x for name, x in params.items() if name not in names}
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in wanted))
    return rest | {"blocks": blocks}


@checks.named
def unstack(params: Tree) -> Tree:
    """Parameters of a model with stacked=False, from those of one with stacked=True.

    Example:
      params = {"blocks": {"w": jnp.ones((2, 3, 4))}}
      w = jla.models.unstack(params)["block_1"]["w"]  # [3, 4]

    Args:
      params: a dict with "blocks", whose arrays have an axis of blocks in front, and whatever else,
        which stays.

    Raises:
      ValueError: there is no "blocks", or its arrays disagree about the number of blocks.
    """
    if "blocks" not in params:
        raise ValueError(f'params must have "blocks", got {sorted(params)}')
    depths = {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])}
    if len(depths) != 1:
        raise ValueError(
            f'all arrays under "blocks" must have the same first axis, got sizes {sorted(depths)}'
        )
    rest = {name: x for name, x in params.items() if name != "blocks"}
    return rest | {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(depths.pop())
    }


def decoder(model: LanguageModel) -> LanguageModel:
    """The model that decodes with the parameters of `decoder_params`."""
    return model.clone(decode=True, stacked=False, unroll=False, remat=None)


def decoder_params(model: LanguageModel, params: Tree) -> Tree:
    """The parameters of `decoder(model)`: those of a model, stacked or not, block by block.

    Matrices are in the dtype of the computation, which every token would convert them to.
    """
    params = cast_matrices(params, jnp.dtype(model.dtype))
    return unstack(params) if "blocks" in params else params


@checks.named
def empty_cache(model: LanguageModel, batch: int, length: int) -> Tree:
    """Returns the cache of a model with decode=True before its first token.

    Example:
      layer = jla.models.Layer(jla.models.Attention(num_heads=4), jla.models.SwiGLU(128))
      model = jla.models.LanguageModel(jla.models.Config(256, width=64, layers=(layer,)))
      cache = jla.models.empty_cache(model, 2, length=100)
      key = cache["block_0"]["mixer"]["cached_key"]  # [2, 4, 100, 16]

    Args:
      model: a LanguageModel, with decode=True or not.
      batch: B.
      length: the most tokens it must hold: attention and PaTH keep all of them, the other mixers
        only their states.
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    shapes = jax.eval_shape(decoder(model).init, jax.random.key(0), tokens)["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def feed(
    decoder: LanguageModel, params: Tree, tokens: Array, cache: Tree, mask: Array | None = None
) -> tuple[jax.Array, Tree]:
    """Runs tokens [B, T] through a decoder; returns each row's last real token's logits
    [B, vocabulary], and the cache."""
    logits, updated = decoder.apply(
        {"params": params, "cache": cache}, tokens, mask, last_only=True, mutable=["cache"]
    )
    return logits[:, 0], updated["cache"]


def restrict(
    logits: jax.Array,
    top_k: jax.Array | int | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """The logits [B, V], with -inf at tokens that are not to be drawn. Equal logits stay together.

    Args:
      logits: float32 [B, V].
      top_k: only so many of the likeliest stay: an integer of at least 1, or one for each row.
      top_p: of these, only the fewest likeliest whose probabilities add up to this: a number above
        0, or one for each row. 1 keeps all.
    """
    B, V = logits.shape
    top_k = jnp.broadcast_to(jnp.asarray(V if top_k is None else top_k, jnp.int32), (B,))
    top_p = jnp.broadcast_to(jnp.asarray(1 if top_p is None else top_p, jnp.float32), (B,))
    ordered = lax.rev(lax.sort(logits, dimension=1), (1,))
    stays = jnp.arange(V, dtype=jnp.int32)[None] < top_k[:, None]
    shares = jax.nn.softmax(jnp.where(stays, ordered, -jnp.inf), axis=1)
    before = jnp.cumsum(shares, axis=1) - shares
    # Sums of all shares can be above 1 by rounding.
    stays &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(
    decoder: LanguageModel,
    params: Tree,
    logits: jax.Array,
    cache: Tree,
    key: jax.Array | None,
    temperature: float | jax.Array,
    length: int,
    *,
    eos: Sequence[int] = (),
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array | None = None,
    keep_logits: bool = True,
) -> tuple[jax.Array, jax.Array | None, Tree]:
    """Draws `length` tokens, one after the other, in one scan.

    Args:
      decoder, params: a model with decode=True and its `decoder_params`.
      logits, cache: what `feed` returned for the tokens so far.
      key: a jax.random.key; None takes the likeliest tokens.
      temperature: 0 takes the likeliest token, too.
      length: how many.
      eos: after one of these tokens its row has only that one.
      top_k, top_p: as in `restrict`, of the logits divided by the temperature; None keeps all.
      keep_logits: whether to return them.

    Returns:
      The new tokens, int32 [B, length], the logits they were drawn from, [B, length, vocabulary],
      or None, and the cache behind them.
    """

    def token(carry, key_and_place):
        kept, cache, ended, tokens = carry
        key, place = key_and_place
        logits = lax.dynamic_index_in_dim(kept, place if keep_logits else 0, keepdims=False)
        chosen = jnp.argmax(logits, axis=-1)
        if key is not None:
            divided = logits / jnp.maximum(temperature, 1e-6)
            if top_k is not None or top_p is not None:
                divided = restrict(divided, top_k, top_p)
            drawn = jax.random.categorical(key, divided)
            chosen = jnp.where(temperature > 0, drawn, chosen)
        chosen = chosen.astype(jnp.int32)
        if eos:
            chosen = jnp.where(ended >= 0, ended, chosen)
            is_eos = jnp.any(chosen[:, None] == jnp.asarray(eos, jnp.int32)[None], axis=1)
            ended = jnp.where(is_eos, chosen, -1)
        new_logits, cache = feed(decoder, params, chosen[:, None], cache)
        here = (jnp.arange(length, dtype=jnp.int32) == place)[:, None]
        tokens = jnp.where(here, chosen[None], tokens)
        row = place + 1 if keep_logits else 0
        kept = lax.dynamic_update_index_in_dim(kept, new_logits, row, 0)
        return (kept, cache, ended, tokens), None

    ended = jnp.full(logits.shape[0], -1, jnp.int32) if eos else None
    keys = None if key is None else jax.random.split(key, length)
    # All is in the carry: a scan's outputs that are also its carry, XLA copies outside of the CUDA
    # graph, for which the GPU waits.
    B, V = logits.shape
    kept = logits[None]
    if keep_logits:
        kept = jnp.concatenate([kept, jnp.zeros((length, B, V), logits.dtype)])
    start = kept, cache, ended, jnp.zeros((length, B), jnp.int32)
    places = jnp.arange(length, dtype=jnp.int32)
    (kept, cache, _, tokens), _ = lax.scan(token, start, (keys, places))
    return tokens.T, jnp.moveaxis(kept[:-1], 0, 1) if keep_logits else None, cache


@checks.named
def generate(
    model: LanguageModel,
    params: Tree,
    tokens: Array,
    *,
    mask: Array | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos: int | Sequence[int] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts: one call reads them, then one scan draws token after token.

    Example:
      layer = jla.models.Layer(jla.models.Attention(num_heads=2), jla.models.SwiGLU(64))
      model = jla.models.LanguageModel(jla.models.Config(50, width=32, layers=(layer,)))
      prompt = jnp.ones((2, 3), jnp.int32)
      params = model.init(jax.random.key(0), prompt)["params"]
      new = jla.models.generate(model, params, prompt, max_new_tokens=4)  # [2, 4]

    Each new shape of the prompts compiles once, and so does each `max_new_tokens` and `eos`, and
    whether there is a mask, a key, a `top_k` and a `top_p`.

    Args:
      model: a LanguageModel, `stacked` or not.
      params: its parameters.
      tokens: integers [B, T], the prompts.
      mask: bool [B, T], True at real tokens, of which each row needs one; prompts of unequal length
        can be padded on either side.
      max_new_tokens: how many tokens each row gets.
      temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
      key: a jax.random.key, needed unless the temperature is 0.
      eos: the token, or tokens, that end a row: behind one, the row has only that one.
      top_k: only so many of the likeliest tokens are drawn from, at least 1; None for all.
      top_p: of these, only the fewest likeliest whose probabilities, at this temperature, add up to
        this number, above 0 and at most 1; None for all. Equally likely tokens stay together.

    Returns:
      int32 [B, max_new_tokens].

    Raises:
      TypeError, ValueError: wrong arguments, among them a temperature without a key.
    """
    checks.check_shapes(tokens=(tokens, "B T"), **{} if mask is None else dict(mask=(mask, "B T")))
    checks.check_count("max_new_tokens", max_new_tokens)
    ends = eos_tokens(eos, model.config.vocabulary)
    if mask is not None and checks.known(mask) and not np.asarray(mask).any(axis=1).all():
        row = int(np.argmin(np.asarray(mask).any(axis=1)))
        raise ValueError(f"mask must have a real token in each row, got none in row {row}")
    greedy = checks.known(temperature) and float(temperature) == 0
    if checks.known(temperature) and not float(temperature) >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not greedy and key is None:
        raise ValueError(f"key must be a jax.random.key for temperature={temperature}, got None")
    if top_k is not None:
        top_k = min(checks.check_count("top_k", top_k), model.config.vocabulary)
    if top_p is not None and checks.known(top_p) and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}; None keeps all tokens")
    return _generate(
        model,
        params,
        jnp.asarray(tokens),
        mask,
        None if greedy else key,
        jnp.asarray(temperature, jnp.float32),
        None if top_k is None else jnp.asarray(top_k, jnp.int32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        length=int(max_new_tokens),
        eos=ends,
    )


def eos_tokens(eos: int | Sequence[int] | None, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a row, checked."""
    if eos is None:
        return ()
    ends = tuple(eos) if isinstance(eos, Sequence) else (eos,)
    for token in ends:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise TypeError(f"eos must be an integer, several, or None, got {eos!r}")
        if not 0 <= token < vocabulary:
            raise ValueError(f"eos must be 0 to {vocabulary - 1}, the vocabulary, got {token}")
    return tuple(map(int, ends))


@functools.partial(jax.jit, static_argnames=("model", "length", "eos"))
def _generate(
    model, params, tokens, mask, key, temperature, top_k=None, top_p=None, *, length, eos
):
    decoding, params = decoder(model), decoder_params(model, params)
    B, T = tokens.shape
    cache = empty_cache(decoding, B, T + length)
    logits, cache = feed(decoding, params, tokens, cache, mask)
    options: dict[str, Any] = dict(eos=eos, top_k=top_k, top_p=top_p, keep_logits=False)
    return draw(decoding, params, logits, cache, key, temperature, length, **options)[0]
