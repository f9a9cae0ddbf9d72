"""Calls that a type checker must judge: read by tests/test_types.py, never run.

`# error: RULE` stands on each line that the checker must complain about, with what it says of it;
`# type: ...` is the type of what the line reveals. All other lines are right.
"""

from typing import reveal_type

import jax
import numpy as np

import jla


def kda(q: jax.Array, k: jax.Array, v: np.ndarray, g: jax.Array, beta: jax.Array) -> None:
    o, state = jla.kda(q, k, v, g, beta, scale=1, implementation="xla")
    reveal_type(o)  # type: Array
    reveal_type(state)  # type: Array
    o, state = jla.kda(q, k, v, g, beta, initial_state=state, segment_ids=np.zeros((2, 9), int))
    o, state = jla.kda_step(q, k, v, g, beta, state)
    o, state = jla.kda_step(q, k, v, g, beta, np.asarray(state))
    reveal_type(state)  # type: Array
    reveal_type(jla.kda_gate(g, beta, beta, lower_bound=-5))  # type: Array

    jla.kda(q, k, v, g, beta, implementation="cuda")  # error: reportArgumentType
    jla.kda([1.0, 2.0], k, v, g, beta)  # error: reportArgumentType
    jla.kda(q, k, v, g)  # error: reportCallIssue
    jla.kda(q, k, v, g, beta, 0.5)  # error: reportCallIssue
    jla.kda(q, k, v, g, beta, chunk_size=64)  # error: reportCallIssue
    jla.kda(q, k, v, g, beta, scale="big")  # error: reportArgumentType
    jla.kda(q, k, v, None, beta)  # error: reportArgumentType
    jla.kda_step(q, k, v, g, beta, None)  # error: reportArgumentType
    jla.kdaa(q, k, v, g, beta)  # error: reportAttributeAccessIssue


def gsa(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array, g: jax.Array) -> None:
    _, state = jla.gsa(q, k, v, s)
    reveal_type(state)  # type: GSAState
    reveal_type(state.hk)  # type: Array
    _, state = jla.gsa_step(q, k, v, s, g, state, implementation=None)
    reveal_type(state)  # type: GSAState

    jla.gsa(q, k, v, s, g, initial_state=(s, s))  # error: reportArgumentType
    jla.gsa_step(q, k, v, s, None, state)  # error: reportArgumentType
    jla.gsa_step(q, k, v, s, g)  # error: reportCallIssue
    jla.GSAState(q)  # error: reportCallIssue


def log_linear(q: jax.Array, g: jax.Array, scales: jax.Array, gsa_state: jla.GSAState) -> None:
    _, state = jla.log_linear_attention(q, q, q, g, scales)
    reveal_type(state)  # type: LogLinearState
    reveal_type(jla.log_linear_step(q, q, q, g, scales, state)[1])  # type: LogLinearState

    jla.log_linear_step(q, q, q, g, scales, gsa_state)  # error: reportArgumentType
    jla.log_linear_attention(q, q, q, g, scales, scale=1.0)  # error: reportCallIssue


def mesa(q: jax.Array, g: jax.Array, lamb: jax.Array) -> None:
    _, state = jla.mesa_net(q, q, q, g, g, lamb, cg_steps=5)
    reveal_type(state)  # type: MesaState
    reveal_type(jla.mesa_step(q, q, q, g, g, lamb, state)[1])  # type: MesaState

    jla.mesa_net(q, q, q, g, g, lamb, cg_steps=0.5)  # error: reportArgumentType
    jla.mesa_net(q, q, q, g, g)  # error: reportCallIssue


def path(q: jax.Array, beta: jax.Array, g: jax.Array, either: jla.PathCache | None) -> None:
    cache = jla.PathCache.empty(2, 100, 4, 64, 64, query_heads=8)
    reveal_type(cache)  # type: PathCache
    o, after = jla.path_attention(q, q, q, q, beta, g, cache=cache)
    reveal_type(o)  # type: Array
    reveal_type(jla.path_step(q, q, q, q, beta, None, after))  # type: tuple[Array, PathCache]
    o, after = jla.path_attention(q, q, q, q, beta)
    reveal_type(after)  # type: None
    o, after = jla.path_attention(q, q, q, q, beta, cache=either)
    reveal_type(after)  # type: PathCache | None

    jla.path_step(q, q, q, q, beta, g, either)  # error: reportArgumentType
    jla.path_attention(q, q, q, q, beta, g, initial_state=cache)  # error: reportCallIssue
    jla.path_attention(q, q, q, q, implementation="xla")  # error: reportCallIssue
    jla.PathCache.empty(2, 100)  # error: reportCallIssue


def others() -> None:
    reveal_type(jla.__version__)  # type: str
    with jla.checking(), jla.pallas.interpret():
        pass
    jla.linen.KimiDeltaAttention(num_heads=1)


def checkpoints() -> None:
    config = jla.hub.read_config("folder")
    reveal_type(config)  # type: dict[str, Any]
    model = jla.hub.model(config, dtype="bfloat16", implementation="xla")
    reveal_type(model)  # type: LanguageModel
    params = jla.hub.load("folder", model)
    reveal_type(jla.hub.save("new", model, params, config))  # type: None
    layer = jla.hub.layer_state(params, "", model)
    reveal_type(layer)  # type: dict[str, ndarray[tuple[Any, ...], dtype[Any]]]

    jla.hub.model(config, implementation="cuda")  # error: reportArgumentType
    jla.hub.model("folder")  # error: reportArgumentType
    jla.hub.load("folder", model, lambda path, shape: None)  # error: reportCallIssue
    jla.hub.save("new", model, params)  # error: reportCallIssue
    jla.hub.layer_params({}, "", model, names="torch")  # error: reportArgumentType
