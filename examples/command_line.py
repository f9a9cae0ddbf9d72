"""What both programs' command lines share: short errors and checked numbers."""

import argparse
import contextlib
import math
import sys


class InputError(Exception):
    """What the user gave cannot be used; the message says what and why."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and exits with 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


@contextlib.contextmanager
def errors_in_one_line(program):
    """Ends the program with 1 and one line, instead of a traceback, on an InputError."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


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
