"""Whether kernels run under an interpreter, which each implementation's `interpret()` says."""

import contextlib
import threading

_state = threading.local()


def interpreting():
    """The interpreter's parameters if the caller is inside `interpret()`, else False."""
    return getattr(_state, "parameters", False)


@contextlib.contextmanager
def interpreted(parameters):
    """Inside, `interpreting()` returns these parameters."""
    before = interpreting()
    _state.parameters = parameters
    try:
        yield
    finally:
        _state.parameters = before
