"""Samples text from a checkpoint of train_lm.py: a prefill, then one jitted scan over tokens.

python examples/generate.py --checkpoint runs/demo --prompt 'The "with" statement'
"""

import functools

import needs  # noqa: F401
import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
from command_line import IMPLEMENTATIONS, Parser, errors_in_one_line, number
from jax import lax
from model import LanguageModel


def decoder_params(model, params):
    """The parameters of `model.clone(decode=True)`: those of a trained model, block by block.

    Matrices are in the dtype of the computation, which every token would convert them to.
    """

    def computed_in(path, leaf):
        matrix = path[-1].key in ("kernel", "embedding") and not path[-2].key.endswith("conv1d")
        return leaf.astype(model.dtype) if matrix else leaf

    params = jax.tree_util.tree_map_with_path(computed_in, params)
    stacked = params["blocks"]
    blocks = {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(model.depth)
    }
    return {name: part for name, part in params.items() if name != "blocks"} | blocks


def empty_cache(decoder, batch, length):
    """Returns the cache of a model with decode=True before its first token.

    `length` is the most tokens it must hold: attention and PaTH keep all of them, the other
    mixers only their states.
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def feed(decoder, params, tokens, cache):
    """Runs tokens [B, T] through the decoder; returns the last one's logits [B, 256], the cache."""
    logits, updated = decoder.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
    return logits[:, -1], updated["cache"]


def draw(decoder, params, logits, cache, key, temperature, length):
    """Draws `length` bytes, one after the other, in one scan.

    Args:
      decoder, params: a model with decode=True and its `decoder_params`.
      logits, cache: what `feed` returned for the text so far.
      key: a jax.random.key.
      temperature: float; 0 takes the likeliest byte.

    Returns:
      The new bytes, int32 [B, length], the logits they were drawn from, [B, length, 256], and the
      cache behind them.
    """

    def token(carry, key):
        logits, cache = carry
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
        return feed(decoder, params, chosen[:, None], cache), (chosen, logits)

    keys = jax.random.split(key, length)
    (_, cache), (tokens, logits) = lax.scan(token, (logits, cache), keys)
    return tokens.T.astype(jnp.int32), jnp.moveaxis(logits, 0, 1), cache


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample(model, params, prompt, key, temperature, *, length):
    """Continues prompts.

    Args:
      model: a LanguageModel.
      params: its parameters.
      prompt: int32 [B, P], P >= 1.
      key: a jax.random.key.
      temperature: float; 0 takes the likeliest byte.
      length: number of bytes to add.

    Returns:
      The new bytes, int32 [B, length], and the logits they were drawn from, [B, length, 256].
    """
    decoder, params = model.clone(decode=True), decoder_params(model, params)
    cache = empty_cache(decoder, prompt.shape[0], prompt.shape[1] + length)
    logits, cache = feed(decoder, params, prompt, cache)
    tokens, logits, _ = draw(decoder, params, logits, cache, key, temperature, length)
    return tokens, logits


def encode(prompt):
    """Returns a string as int32 [1, P]."""
    return jnp.asarray(np.frombuffer(prompt.encode(), np.uint8)[None], jnp.int32)


def decode(tokens):
    """Returns bytes [P] as a string; what is no UTF-8 shows as a replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


def parse(arguments):
    parser = Parser(prog="generate.py", description="Sample text from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="train_lm.py's --out")
    parser.add_argument("--step", type=number(int, 0), help="default: the latest checkpoint's")
    parser.add_argument("--prompt", default="The ", help="text to continue (default: %(default)r)")
    parser.add_argument("--length", type=number(int, 1), default=400, help="bytes to add")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.7, help="0 takes the likeliest byte"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    options = parser.parse_args(arguments)
    if not options.prompt:
        parser.error("argument --prompt: must not be empty")
    return options


def main(arguments=None):
    options = parse(arguments)
    with errors_in_one_line("generate.py"):
        step = checkpoint.find_step(options.checkpoint, options.step, flag="--step")
        manager = checkpoint.open_manager(options.checkpoint, read_only=True)
        settings = checkpoint.load_settings(manager, step)
        model = LanguageModel(**settings["model"], implementation=options.implementation)
        params = checkpoint.load_params(manager, step, model)
        key = jax.random.key(options.seed)
        prompt = encode(options.prompt)
        tokens, _ = sample(model, params, prompt, key, options.temperature, length=options.length)
    print(options.prompt + decode(tokens[0]))


if __name__ == "__main__":
    main()
