"""The two programs of continuous batching: a prefill of some slots of a pool, a step of all.

Both are compiled before the first request, and no request compiles anything. What a request needs
for its draws stays in the pool too, so that a step can start before the host knows the last tokens.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import jla.linen
from jla.models.generate import decoder, decoder_params, empty_cache, restrict

# Of a prefill's rows, as columns of its integers and floats.
INTEGERS = ("slot", "length", "begins", "ends", "seed", "top_k")
FLOATS = ("temperature", "top_p")
BITS = 2**32  # of seeds
# Of more tokens the logits are sorted only if a request wants it: it would take longer than the
# rest of a step. But a condition makes the host wait for a GPU.
SMALL_VOCABULARY = 4096


class Engine:
    """A pool of sequences, and the compiled programs that advance it.

    Args:
      model, params: a LanguageModel and its parameters, stacked or not.
      slots: S, the sequences in the pool, and the rows of a decoding step.
      capacity: the most tokens of a sequence, its prompt's and the new ones.
      rows, chunk: the pieces of prompts in a prefill, and the tokens in each.
      steps: how many tokens a decoding call draws, one after the other.
      packed: whether the pieces lie behind one another, rows * chunk tokens together, so that no
        room is lost; the model's mixers must support it, see `packs`.
    """

    def __init__(self, model, params, *, slots, capacity, rows=4, chunk=512, steps=1, packed=False):
        self.slots, self.rows, self.steps = slots, rows, steps
        self.shape = (1, rows * chunk) if packed else (rows, chunk)  # of a prefill's tokens
        self.vocabulary = model.config.vocabulary
        self.params = jax.jit(functools.partial(decoder_params, model))(params)
        self.pool = {
            "cache": empty_cache(model, slots, capacity),
            "token": np.zeros(slots, np.int32),
            "drawn": np.zeros(slots, np.int32),
            "seed": np.zeros(slots, np.uint32),
            "top_k": np.zeros(slots, np.int32),
            **{name: np.zeros(slots, np.float32) for name in FLOATS},
        }
        self.pool = jax.device_put(self.pool, jax.devices()[0])
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.pool)) / slots
        began = time.perf_counter()
        model = decoder(model)
        prefill_rows = (
            np.zeros(self.shape, np.int32),
            np.zeros((rows, len(INTEGERS)), np.uint32),
            np.zeros((rows, len(FLOATS)), np.float32),
        )
        reading = functools.partial(prefill, model, packed=packed)
        self._prefill = self._compiled(reading, *prefill_rows)
        decoding = functools.partial(decode, model, steps=steps)
        self._decode = self._compiled(decoding, np.zeros(slots, np.int32))
        # Once without a request: a device loads a program when it runs first.
        jax.block_until_ready((self.prefill([]), self.decode({})))
        self.compile_s = time.perf_counter() - began

    def _compiled(self, program, *arguments):
        jitted = jax.jit(program, donate_argnums=1)
        return jitted.lower(self.params, self.pool, *arguments).compile()

    def memory_bytes(self):
        """The most that one of the programs needs: parameters, the pool and temporaries."""
        plans = [program.memory_analysis() for program in (self._prefill, self._decode)]
        return max(
            plan.argument_size_in_bytes
            + plan.temp_size_in_bytes
            + plan.output_size_in_bytes
            - plan.alias_size_in_bytes
            for plan in plans
        )

    def prefill(self, pieces):
        """Reads `scheduler.Piece`s of prompts; returns the next tokens [rows] on the device.

        They mean something for the pieces that end their prompt.
        """
        tokens = np.zeros(self.shape, np.int32)
        integers = np.zeros((self.rows, len(INTEGERS)), np.uint32)
        floats = np.zeros((self.rows, len(FLOATS)), np.float32)
        integers[:, 0] = BITS - 1  # as int32, -1
        place = 0
        for i, piece in enumerate(pieces):
            request, length = piece.running.request, piece.stop - piece.start
            row = i % self.shape[0]
            tokens[row, place : place + length] = piece.tokens
            place += length if self.shape[0] == 1 else 0
            top_k = self.vocabulary if request.top_k is None else request.top_k
            top_k = min(top_k, self.vocabulary)
            integers[i] = piece.slot, length, piece.begins, piece.ends, request.seed, top_k
            floats[i] = request.temperature, 1 if request.top_p is None else request.top_p
        self.pool, drawn = self._prefill(self.params, self.pool, tokens, integers, floats)
        drawn.copy_to_host_async()
        return drawn

    def decode(self, counts):
        """Draws `counts[slot]` tokens, at most `steps`, for each of these slots; returns tokens
        [steps, slots], on the device."""
        array = np.zeros(self.slots, np.int32)
        for slot, count in counts.items():
            array[slot] = count
        self.pool, drawn = self._decode(self.params, self.pool, array)
        drawn.copy_to_host_async()
        return drawn


def packs(model):
    """Whether all mixers of a model read packed prompts from a slot for each."""
    mixers = (layer.mixer for layer in model.config.layers)
    return all(getattr(mixer, "packs_states", False) for mixer in mixers)


def prefill(model, params, pool, tokens, integers, floats, *, packed):
    """Tokens of P sequences into the pool, [P, C] or packed [1, P * C]; where a prompt ends, its
    first new token.

    `integers` and `floats` have P rows and the columns INTEGERS and FLOATS. A slot of -1 is none.
    """
    row = dict(zip(INTEGERS, integers.T, strict=True)) | dict(zip(FLOATS, floats.T, strict=True))
    slots, length, top_k = (row[name].astype(jnp.int32) for name in ("slot", "length", "top_k"))
    begins, ends = row["begins"] > 0, row["ends"] > 0
    cache = jla.linen.clear(pool["cache"], jnp.where(begins, slots, -1))
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if packed:
        ids = jnp.sum(place >= jnp.cumsum(length)[:, None], axis=0, dtype=jnp.int32)
        ids = jnp.where(ids < slots.shape[0], ids, -1)[None]
        logits, cache = feed(model, params, cache, tokens, slots[None], segment_ids=ids)
        logits = logits[0]
    else:
        mask = place < length[:, None]
        logits, cache = feed(model, params, cache, tokens, slots, mask=mask)
        logits = logits[:, 0]
    own = dict(seed=row["seed"], top_k=top_k, temperature=row["temperature"], top_p=row["top_p"])
    drawn = choose(logits, jnp.zeros_like(slots), **own)
    S = pool["token"].shape[0]

    def put(name, rows, values):
        place = jnp.where(rows & (slots >= 0), slots, S)
        return pool[name].at[place].set(values, mode="drop")

    pool = pool | {name: put(name, begins, values) for name, values in own.items()}
    pool |= dict(token=put("token", ends, drawn), drawn=put("drawn", ends, jnp.ones_like(slots)))
    return pool | dict(cache=cache), drawn


def decode(model, params, pool, counts, *, steps):
    """Draws `counts` [S] tokens more for the pool's sequences, at most `steps`: [steps, S]."""
    places = jnp.arange(counts.shape[0], dtype=jnp.int32)
    own = {name: pool[name] for name in ("seed", "top_k", *FLOATS)}

    def step(carry, i):
        cache, token, drawn = carry
        active = i < counts
        slots = jnp.where(active, places, -1)
        logits, cache = feed(model, params, cache, token[:, None], slots)
        logits = logits[:, 0]
        # What finished requests wanted is still there.
        settings = own | dict(temperature=jnp.where(active, own["temperature"], 0.0))
        token = jnp.where(active, choose(logits, drawn, **settings), token)
        return (cache, token, drawn + active), token

    carry = pool["cache"], pool["token"], pool["drawn"]
    if steps == 1:
        carry, tokens = step(carry, 0)
        tokens = tokens[None]
    else:
        carry, tokens = jax.lax.scan(step, carry, jnp.arange(steps, dtype=jnp.int32))
    return pool | dict(zip(("cache", "token", "drawn"), carry, strict=True)), tokens


def feed(model, params, cache, tokens, slots, **options):
    """The logits behind the last token of each row or segment, and the pool with the tokens."""
    variables = {"params": params, "cache": cache}
    options |= dict(slots=slots, last_only=True, mutable=["cache"])
    logits, updated = model.apply(variables, tokens, **options)
    return logits, updated["cache"]


def choose(logits, drawn, *, seed, temperature, top_k, top_p):
    """A token for each row, by its own settings [B]; `drawn` counts those that it has drawn.

    The key depends on the seed and the count alone, and is the one that `jla.models.generate` has
    for this token of a single row with `key=jax.random.key(seed)`.
    """

    divided = logits / jnp.maximum(temperature, 1e-6)[:, None]
    V = logits.shape[1]
    if V <= SMALL_VOCABULARY:
        divided = restrict(divided, top_k, top_p)
    else:
        wanted = jnp.any((temperature > 0) & ((top_k < V) | (top_p < 1)))
        divided = jax.lax.cond(wanted, restrict, lambda x, *_: x, divided, top_k, top_p)
    keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seed, drawn)
    sampled = jax.vmap(jax.random.categorical)(keys, divided)
    likeliest = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, sampled, likeliest).astype(jnp.int32)
