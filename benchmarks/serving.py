"""Serves random requests with every mixer side by side, by examples/serve.py.

All requests are there from the start: the times to the first token are mostly those in the queue.
"""

import gc
import json
import os
import pathlib
import sys
import tempfile
import time

from benchmarks import side_by_side  # which finds the examples

import serve  # isort: skip

KEYS = ("mixer", "prefill")
PACKED = ("kda", "gsa", "log_linear", "mesa")  # the others read prompts in rows
# What a row keeps of the report of serve.py.
LEFT_OUT = ("results", "options", "device", "jax", "vocabulary")


def main(argv=None):
    options = parse(argv)
    # The pool of softmax attention takes tens of gigabytes; read when the backend starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "serving", argv)
    for mixer in options.mixers:
        if options.limit is not None and time.monotonic() - start > options.limit:
            print(f"not started, past --limit: {mixer}", flush=True)
            continue
        print(f"[{time.monotonic() - start:6.1f} s] {mixer}", flush=True)
        prefill = options.prefill if mixer in PACKED else "rows"
        report.measure(dict(mixer=mixer, prefill=prefill), served(mixer, prefill, options))
        gc.collect()  # the pool, before the next one is made
    print(f"[{time.monotonic() - start:6.1f} s] end", flush=True)
    return 1 if report.failed else 0


def parse(argv):
    made = side_by_side.parser("serving", __doc__.splitlines()[0])
    made.add_argument("--requests", type=int, default=512)
    made.add_argument("--prompt-length", type=serve.length_range, default=(100, 4000))
    made.add_argument("--new-tokens", type=int, default=256, help="of each request")
    made.add_argument("--slots", type=int, default=128, help="requests that run at once")
    made.add_argument("--rows", type=int, default=4, help="prompts that a prefill reads")
    made.add_argument("--chunk", type=int, default=512, help="tokens that it reads of each")
    made.add_argument("--prefill", choices=("packed", "rows"), default="packed")
    made.add_argument("--decode-steps", type=int, default=1, help="tokens of a decoding call")
    return side_by_side.parse(made, argv)


def served(mixer, prefill, options):
    """Yields the numbers of one run, the tokens drawn at temperature 1."""
    least, most = options.prompt_length
    implementation = options.implementation
    yield dict(
        implementation=None if mixer == "attention" else implementation,
        **dict(width=options.width, depth=options.depth, heads=options.heads),
        **dict(prompt_length=[least, most], rows=options.rows, chunk=options.chunk),
        decode_steps=options.decode_steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "report.json"
        arguments = dict(
            mixer=mixer,
            **dict(width=options.width, depth=options.depth, heads=options.heads),
            dtype=options.dtype,
            synthetic=options.requests,
            prompt_length=f"{least}:{most}",
            new_tokens=options.new_tokens,
            capacity=most + options.new_tokens,
            temperature=1.0,
            **dict(slots=options.slots, rows=options.rows, chunk=options.chunk),
            decode_steps=options.decode_steps,
            prefill=prefill,
            json=out,
        )
        if implementation and mixer != "attention":
            arguments["implementation"] = implementation
        line = [
            text
            for name, value in arguments.items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        if serve.run(serve.parse(line)):
            raise KeyboardInterrupt
        report = json.loads(out.read_text())
    lengths = {len(result["tokens"]) for result in report["results"]}
    if lengths != {options.new_tokens}:
        raise RuntimeError(f"requests have {sorted(lengths)} new tokens")
    yield {name: value for name, value in report.items() if name not in LEFT_OUT}


if __name__ == "__main__":
    sys.exit(main())
