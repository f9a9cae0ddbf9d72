"""Several processes, each with devices of its own, that run the same program on one mesh.

Each of them runs all jitted calls. The first alone writes files, samples and prints; the folder of
a run must be on a file system that all of them see.
"""

import contextlib
import sys

import jax
import numpy as np
from command_line import InputError, number
from jax.experimental import multihost_utils

FOUND = "auto"  # --coordinator, where JAX finds the processes by itself
LONGEST = 2000  # bytes of a message between processes


def add_options(parser):
    whole = number(int, 1)
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"one of several processes: where the first one listens; {FOUND} under Slurm, Open "
        "MPI and others that jax.distributed.initialize() knows, which then says the rest, too",
    )
    parser.add_argument("--processes", type=whole, help="how many there are")
    parser.add_argument("--process", type=number(int, 0), help="which one this is, from 0")


def find_conflict(options):
    """Says which of the options do not go together; None if all do."""
    count, index = options.processes, options.process
    if (options.coordinator or FOUND) == FOUND:
        if (count, index) == (None, None):
            return None
        found = f"--coordinator {FOUND} finds them" if options.coordinator else "there is none"
        return f"--processes and --process go with --coordinator HOST:PORT; {found}"
    if count is None or index is None:
        return "--coordinator HOST:PORT needs --processes and --process"
    if index >= count:
        return f"--process {index} must be 0 to {count - 1}, one for each of --processes {count}"
    return None


def start(options):
    """Connects the processes; nothing must have used JAX's devices before."""
    if options.coordinator is None:
        return
    where = (options.coordinator, options.processes, options.process)
    try:
        jax.distributed.initialize(*(() if options.coordinator == FOUND else where))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot connect the processes: {error}") from error


def is_first():
    return jax.process_index() == 0


@contextlib.contextmanager
def agreed():
    """What is inside is done by each process. If one raises InputError, all of them end with it.

    Each process waits here for the others.
    """
    if jax.process_count() == 1:
        yield
        return
    message, cause = "", None
    try:
        yield
    except InputError as error:
        message, cause = str(error), error
    for process, said in enumerate(exchange(message)):
        if said:
            fail(said if process == 0 else f"in process {process}: {said}", cause)


def fail(message, cause=None):
    """Raises InputError in the first process; the others, which do the same, say nothing."""
    if is_first():
        raise InputError(message) from cause
    sys.exit(1)


def exchange(text):
    """The texts of all processes, in their order."""
    sent = np.zeros(LONGEST, np.uint8)
    encoded = text.encode()[:LONGEST]
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = multihost_utils.process_allgather(sent).reshape(-1, LONGEST)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in received]


def check_same(description):
    """Raises InputError unless all processes were started with the same options and files."""
    with agreed():
        if jax.process_count() > 1 and (first := exchange(description)[0]) != description:
            raise InputError(
                f"other options or another text than the first: {description}, {first}"
            )


def stop_signal(received, *, asking):
    """The signal that ends a run now, or None: the first that this process has received.

    Several processes must end together. They tell one another where all of them are `asking`.
    """
    signal = received[0] if received else 0
    if jax.process_count() > 1:
        signal = int(multihost_utils.process_allgather(np.int32(signal)).max()) if asking else 0
    return signal or None
