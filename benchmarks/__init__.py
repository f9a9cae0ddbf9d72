"""One harness that times every mechanism: `python -m benchmarks.run --help`."""
