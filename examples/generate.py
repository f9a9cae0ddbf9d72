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
from model import make_model

from jla.models.generate import decoder, decoder_params, draw, empty_cache, feed


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample(model, params, prompt, key, temperature, *, length):
    """Continues prompts, as `jla.models.generate` does, and returns the logits too.

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
    decoding, params = decoder(model), decoder_params(model, params)
    cache = empty_cache(decoding, prompt.shape[0], prompt.shape[1] + length)
    logits, cache = feed(decoding, params, prompt, cache)
    tokens, logits, _ = draw(decoding, params, logits, cache, key, temperature, length)
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
        model = make_model(**settings["model"], implementation=options.implementation)
        params = checkpoint.load_params(manager, step, model)
        key = jax.random.key(options.seed)
        prompt = encode(options.prompt)
        tokens, _ = sample(model, params, prompt, key, options.temperature, length=options.length)
    print(options.prompt + decode(tokens[0]))


if __name__ == "__main__":
    main()
