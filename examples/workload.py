"""Requests: read from prompt files, or drawn as a random arrival process; and which are refused."""

import dataclasses
import json
import math
import numbers
import pathlib

import numpy as np
from command_line import InputError
from scheduler import Request

SETTINGS = ("new_tokens", "temperature", "top_k", "top_p", "stop", "seed")
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Refused:
    """A request that is not served."""

    name: str
    reason: str


def read(paths, encode, defaults):
    """The requests of prompt files, and in their places what is refused of them.

    Of a file *.jsonl each line is an object with "prompt" (text) or "tokens" (integers), and what
    it sets of SETTINGS; of another file each line is a prompt. A request's seed is by default the
    one of `defaults`, plus its number.

    Args:
      paths: files.
      encode: a function of text to tokens.
      defaults: a Request's fields, of SETTINGS.

    Raises:
      InputError: a file cannot be read, or has no line.
    """
    found = []
    for path in map(pathlib.Path, paths):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise InputError(f"cannot read the prompts {path}: {reason}") from None
        if not lines:
            raise InputError(f"the prompt file {path} is empty")
        for i, line in enumerate(lines, 1):
            name = f"{path}:{i}"
            seed = (defaults["seed"] + len(found)) % SEEDS
            try:
                fields = object_of(line) if path.suffix == ".jsonl" else dict(prompt=line)
                tokens = tokens_of(fields, encode)
                settings = defaults | dict(seed=seed) | fields
                settings["stop"] = tuple(settings["stop"])
                found.append(Request(name, tokens, **settings))
            except (TypeError, ValueError) as error:
                found.append(Refused(name, str(error)))
    return found


def object_of(line):
    """A line of JSON as a dict with known names."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise TypeError(f"it must be a JSON object, got {type(fields).__name__}")
    known = ("prompt", "tokens", *SETTINGS)
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if isinstance(fields.get("stop"), int):
        fields["stop"] = [fields["stop"]]
    if not isinstance(fields.get("stop", []), list):
        raise TypeError(f"stop must be a token or a list of tokens, got {fields['stop']!r}")
    return fields


def tokens_of(fields, encode):
    """Takes the prompt's tokens out of a dict."""
    if ("prompt" in fields) == ("tokens" in fields):
        raise ValueError('it must have "prompt" or "tokens", and not both')
    if "tokens" in fields:
        tokens = fields.pop("tokens")
        if not isinstance(tokens, list):
            raise TypeError(f"tokens must be a list, got {tokens!r}")
        return tokens
    prompt = fields.pop("prompt")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be text, got {prompt!r}")
    return [int(token) for token in encode(prompt)] if prompt else []


def synthetic(count, *, rate, lengths, vocabulary, settings):
    """`count` requests of random tokens.

    They arrive as a Poisson process of `rate` a second, or all at the start if it is None. Lengths
    are uniform in `lengths`, both ends included. All depends on the seed in `settings`, a Request's
    fields of SETTINGS; the requests' own seeds are this one plus their number.
    """
    draw = np.random.default_rng(settings["seed"])
    waits = np.zeros(count) if rate is None else draw.exponential(1 / rate, count)
    arrivals = np.cumsum(waits).tolist()
    sizes = draw.integers(*lengths, size=count, endpoint=True)
    return [
        Request(
            f"request {i}",
            draw.integers(vocabulary, size=size).tolist(),
            arrival=arrival,
            **settings | dict(seed=(settings["seed"] + i) % SEEDS),
        )
        for i, (size, arrival) in enumerate(zip(sizes, arrivals, strict=True))
    ]


def reason_to_refuse(request, vocabulary, capacity):
    """Says why a request cannot be served, what was received and what is accepted; or None."""
    lists = dict(tokens=request.prompt, stop=request.stop)
    for name, tokens in lists.items():
        for token in tokens:
            if not whole(token) or not 0 <= token < vocabulary:
                return (
                    f"{name} must be integers from 0 to {vocabulary - 1}, the vocabulary, got "
                    f"{token!r}"
                )
    if not request.prompt:
        return "the prompt is empty; it must have a token"
    if not whole(request.new_tokens) or request.new_tokens < 1:
        return f"new_tokens must be an integer of at least 1, got {request.new_tokens!r}"
    size = len(request.prompt) + request.new_tokens
    if size > capacity:
        return (
            f"its {len(request.prompt)} tokens and {request.new_tokens} new ones are {size}, and a "
            f"slot holds {capacity} (--capacity)"
        )
    if not real(request.temperature) or request.temperature < 0:
        return f"temperature must be a number of at least 0, got {request.temperature!r}"
    top_k, top_p = request.top_k, request.top_p
    if top_k is not None and (not whole(top_k) or top_k < 1):
        return f"top_k must be an integer of at least 1, got {top_k!r}"
    if top_p is not None and (not real(top_p) or not 0 < top_p <= 1):
        return f"top_p must be a number above 0 and at most 1, got {top_p!r}"
    if not whole(request.seed) or not 0 <= request.seed < SEEDS:
        return f"seed must be an integer from 0 to {SEEDS - 1}, got {request.seed!r}"
    return None


def whole(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def real(x):
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
