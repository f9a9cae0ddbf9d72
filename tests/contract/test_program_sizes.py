"""XLA's compile time goes with the number of operations, which a CPU has a kernel each for."""

import jax
import pytest
from equations import operations
from harness import inputs, with_gradients
from mechanisms import MECHANISMS


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)
def test_equations_of_values_and_gradients(mechanism):
    """Those of a forward pass and its transpose in "xla", loops' bodies once."""
    sizes = mechanism.form("xla").sizes
    args, cotangents = inputs(mechanism, sizes)

    def both(args, cotangents):
        return with_gradients(
            lambda args: mechanism.run(**args, implementation="xla"), args, cotangents
        )

    found = operations(jax.make_jaxpr(both)(args, cotangents).jaxpr)
    assert found <= mechanism.operations
