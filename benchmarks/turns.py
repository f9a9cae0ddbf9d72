"""Benchmarks that compile at the same time, and are timed one after another.

    python -m benchmarks.turns --limit 300 --logs /tmp/logs \
        'benchmarks.run --mechanism kda --what context,backward --out kda.json' \
        'benchmarks.run --mechanism gsa --what context,backward --out gsa.json'

Each is a process, with one case to measure: with more, one would compile while others are timed.
Tracing a kernel and compiling it take tens of seconds of a processor, and no GPU.
`--stages 0,1,1` lets the first compile before the others, so that these find in
JAX_COMPILATION_CACHE_DIR how its products were tuned. Output goes to files 0.log, 1.log, ... under
--logs.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

VARIABLE = "JLA_BENCHMARK_TURN"  # of the processes: folder, number and stages


def to_compile():
    """Waits until all processes of earlier stages have compiled."""
    if (turn := _turn()) is not None:
        folder, number, stages = turn
        _wait(folder / f"compiled.{i}" for i, s in enumerate(stages) if s < stages[number])


def to_time():
    """Waits until all processes have compiled, and those before this one have ended."""
    if (turn := _turn()) is not None:
        folder, number, stages = turn
        (folder / f"compiled.{number}").touch()
        _wait(folder / f"compiled.{i}" for i in range(len(stages)))
        _wait(folder / f"ended.{i}" for i in range(number))


def _turn():
    if VARIABLE not in os.environ:
        return None
    folder, number, stages = os.environ[VARIABLE].split(":")
    return pathlib.Path(folder), int(number), list(map(int, stages.split(",")))


def _wait(paths):
    for path in paths:
        while not path.exists():
            time.sleep(0.02)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    add = parser.add_argument
    add("commands", nargs="+", help="a module and its options, each as one argument")
    add("--stages", help="0,1,1: a number for each command (default: all at once)")
    add("--limit", type=float, help="end what runs after so many seconds")
    add("--logs", required=True, help="a folder for what they print")
    options = parser.parse_args(argv)
    commands, logs = options.commands, pathlib.Path(options.logs)
    stages = options.stages or ",".join("0" for _ in commands)
    if len(stages.split(",")) != len(commands):
        parser.error(f"--stages {stages} must have a number for each of {len(commands)} commands")
    logs.mkdir(parents=True, exist_ok=True)
    codes = [None] * len(commands)
    with tempfile.TemporaryDirectory() as folder:
        runs = (
            (folder, i, stages, command, options.limit, logs, codes)
            for i, command in enumerate(commands)
        )
        threads = [threading.Thread(target=_run, args=run) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0 if not any(codes) else 1


def _run(folder, number, stages, command, limit, logs, codes):
    began = time.monotonic()
    environment = os.environ | {VARIABLE: f"{folder}:{number}:{stages}"}
    with (logs / f"{number}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            codes[number] = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            codes[number] = process.wait()
    # However it ended: the others shall not wait for it.
    for what in ("compiled", "ended"):
        pathlib.Path(folder, f"{what}.{number}").touch()
    print(f"[{time.monotonic() - began:6.1f} s] {codes[number]}: {command}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
