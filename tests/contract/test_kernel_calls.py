"""With `axis_name` no kernel runs twice: what it adds are first passes, which have no outputs."""

import collections

import jax
import jax.numpy as jnp
import pytest
from equations import equations
from harness import inputs, with_gradients
from mechanisms import MECHANISMS

import jla.pallas
from jla.pallas.common import scratch

launch = pytest.importorskip("jla.triton.launch", reason="triton is not installed")

# The first passes over a device's tokens, forward and backward: for their states and transitions.
FIRST_PASSES = {
    ("kda", "pallas"): ["pieces._transitions", "pieces._gradient_terms"],
    ("gsa", "pallas"): ["states", "states"],
    ("mesa", "pallas"): ["states", "states"],
    ("kda", "triton"): ["kda_transitions", "kda_gradient_transitions"],
    ("gsa", "triton"): ["gsa_states", "gsa_states"],
    ("mesa", "triton"): ["states_kernel", "states_kernel"],
}
ROWS = [
    pytest.param(
        m,
        name,
        id=f"{m.name}-{name}",
        # Traced around the same functions as the other's.
        marks=[pytest.mark.slow] * (m.name in ("path", "log_linear") and name == "triton"),
    )
    for m in MECHANISMS
    for name in ("pallas", "triton")
]


def marked(name, outputs, inputs):
    """In a kernel's place: a function of its name."""

    def nothing(*_):
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    nothing.__name__ = f"kernel {name}"
    return jax.jit(nothing)(*(x for x in jax.tree.leaves(inputs) if hasattr(x, "shape")))


def mosaic_kernel(body, *, inputs, outputs, **_):
    """`scratch.kernel`'s place. The name is that of the kernel's module, and of its function where
    a module has several."""
    function = getattr(body, "func", body)
    name, _, _ = function.__qualname__.partition(".<locals>")
    name = function.__module__.rpartition(".")[2] + (f".{name}" if name != "_body" else "")
    leaves, tree = jax.tree.flatten(outputs)
    results = jax.tree.unflatten(tree, marked(name, leaves, inputs))
    return collections.namedtuple("Results", outputs)(**results)


def triton_kernel(kernel, inputs, grid, outputs, *_):
    return marked(kernel.__name__, outputs, inputs)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels are marked and served wherever this runs."""
    monkeypatch.setattr(scratch, "kernel", mosaic_kernel)
    monkeypatch.setattr(launch, "_launch", triton_kernel)
    monkeypatch.setattr(launch, "_compiled_for", 90)
    for backend in (jla.pallas, jla.triton):
        monkeypatch.setattr(backend, "unsupported_device", lambda: None)
        monkeypatch.setattr(backend, "missing_packages", lambda: None)


def calls(mechanism, name, args, cotangents, **options):
    """How often which kernel is called for values and gradients."""

    def both(args, cotangents):
        def run(args):
            return mechanism.run(**args, implementation=name, **options)

        return with_gradients(run, args, cotangents)

    jaxpr = jax.make_jaxpr(both, axis_env=[("seq", 2)])(args, cotangents)
    names = (x.params.get("name") for x in equations(jaxpr.jaxpr) if x.primitive.name == "jit")
    return collections.Counter(x.removeprefix("kernel ") for x in names if x.startswith("kernel "))


@pytest.mark.parametrize("mechanism, name", ROWS)
def test_no_kernel_runs_twice(kernels, mechanism, name):
    # T is no other test's: traces are kept, and kernels are in none of these.
    sizes = dict(mechanism.form(name).sizes) | dict(T=44)
    if mechanism.name == "path":
        sizes |= dict(H=1, HQ=2)  # keys move; exchanged heads are whole sequences'
    args, (output, of_state) = inputs(mechanism, sizes, "bfloat16")
    if not mechanism.always_returns_state:
        del args[mechanism.state[0]]
        of_state = None
    case = mechanism, name, args, (output, of_state)
    alone, got = calls(*case), calls(*case, axis_name="seq")
    added = collections.Counter(FIRST_PASSES.get((mechanism.name, name), []))
    assert alone
    assert got == alone + added
