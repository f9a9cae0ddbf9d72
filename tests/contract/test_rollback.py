"""Rollback, from docs/serving.md: states are values. Tokens run from one and are dropped, and some
of them run from it again."""

import functools

import jax
import numpy as np
import pytest
from evaluator import evaluated
from harness import assert_close, assert_same_bits, cut, inputs
from mechanisms import COMPILED_ON_CPU

RAN, KEPT = 6, 2  # tokens


@pytest.mark.parametrize("mechanism, implementation, sizes", COMPILED_ON_CPU)
def test_tokens_that_ran_and_were_dropped_leave_no_trace(mechanism, implementation, sizes):
    args, _ = inputs(mechanism, dict(sizes) | dict(T=RAN))
    start = args[mechanism.state[0]]
    former = jax.tree.map(np.copy, start)
    constant = {name: args[name] for name in mechanism.shared()}
    options = dict(implementation=implementation.name)
    run = evaluated(jax.jit(lambda args: mechanism.run(**args, **options)))
    step = evaluated(jax.jit(functools.partial(mechanism.step, **constant, **options)))

    def steps(args, count):
        state, outputs = start, []
        for t in range(count):
            token = {name: args[name][:, t] for name in mechanism.tokenwise()}
            o, state = step(**token, **{mechanism.state[1]: state})
            outputs.append(np.asarray(o))
        return np.stack(outputs, axis=1), state

    only = steps(args, KEPT)
    changed = {n: mechanism.later(n, args[n][:, KEPT:]) for n in mechanism.tokenwise()}
    other = {n: np.concatenate([args[n][:, :KEPT], x], axis=1) for n, x in changed.items()}
    # By the run of all tokens, as a target model reads guesses: what is dropped moves no output in
    # front of it; committing is a run of those that are kept.
    read, of_other = (np.asarray(run(args | more)[0]) for more in ({}, other))
    assert_same_bits(read[:, :KEPT], of_other[:, :KEPT])
    assert not np.array_equal(read[:, KEPT:], of_other[:, KEPT:])
    committed = run(cut(mechanism, args, 0, KEPT))
    assert_close((read[:, :KEPT], committed), (only[0], only), 1e-4)
    # By steps: as if there had been no others.
    assert_same_bits(steps(args, RAN)[0][:, :KEPT], only[0])
    assert_same_bits(steps(args, KEPT), only)
    assert_same_bits(start, former)
