"""What the programs' command lines share: short errors, checked numbers, signals and locks."""

import argparse
import contextlib
import fcntl
import math
import os
import signal
import sys

IMPLEMENTATIONS = ("reference", "xla", "pallas", "triton")  # all of jla's


class InputError(Exception):
    """What the user gave cannot be used; the message says what and why."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and exits with 2; --help has defaults."""

    def add_argument(self, *names, help="", **settings):
        shown = "%(default)" in help or settings.get("default") in (None, argparse.SUPPRESS)
        if not shown:
            help = f"{help} (default: %(default)s)".lstrip()
        return super().add_argument(*names, help=help, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


@contextlib.contextmanager
def errors_in_one_line(program):
    """Ends the program in one line, instead of a traceback, where the cause is not the program's.

    With 1 on an InputError and on an OSError that names a file, with 130 on Ctrl-C.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("; ".join([f"{program}: interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def errors_of_jla():
    """Raises InputError for what jla refuses: files that are no checkpoint, a package that is
    missing, a model that cannot be built, an implementation that cannot do this."""
    try:
        yield
    except (ModuleNotFoundError, NotImplementedError, ValueError) as error:
        if not str(error).startswith("jla."):
            raise
        raise InputError(error) from error


@contextlib.contextmanager
def writing(path):
    """Raises InputError if what is inside cannot write to this path, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(directory):
    """Raises InputError if another process has locked this folder. A lock ends with its process."""
    with writing(directory):
        folder = os.open(directory, os.O_RDONLY)
    try:
        with writing(directory):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing to {directory}") from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def stop_requests():
    """Yields a list that SIGINT (Ctrl-C) and SIGTERM are added to, in place of what they do.

    Only the first: the second does what it did. A signal that was ignored stays so.
    """
    received = []
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: handler for number, handler in former.items() if handler != signal.SIG_IGN}

    def restore():
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number, frame):
        received.append(number)
        restore()

    for number in former:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def number(kind, least, *, exclusive=False):
    """Returns an argparse type: a finite number of this kind, at least (or above) `least`."""
    wanted = f"{'an integer' if kind is int else 'a number'} {'>' if exclusive else '>='} {least}"

    def convert(string):
        try:
            value = kind(string)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {string!r}")
        return value

    return convert
