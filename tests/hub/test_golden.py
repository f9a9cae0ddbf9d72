"""Loaded checkpoints compute what the originals do: logits, greedy tokens, gradients."""

import checkpoints
import numpy as np
import pytest
from checkpoints import NAMES, golden, loaded, results, run

import jla.hub
from jla.hub import _configs, mapping

# Of the largest logit. fla's conjugate gradients end that far from the solution.
TOLERANCE = {name: 2e-2 if name == "fla_mesa" else 1e-4 for name in NAMES}
# fla's chunked kernel of KDA multiplies in TF32 from the 17th token on, whatever torch is told;
# where fla goes token by token it does not.
EXACT_TOKENS = {"fla_kda": 16}
CHUNKED = {"fla_kda": 3e-4}
# In bfloat16 the next token's router chooses another expert, whose score is close.
ROUTED_ALIKE = {"kimi_linear": 10}
# By less than that much, a greedy token's logit may win in one program and lose in another.
MARGIN = {"fla_mesa": 2e-2}
# Of gradients: fla's of MesaNet have the error of its conjugate gradients, too.
OF_GRADIENTS = {"fla_mesa": 2e-2}

names = pytest.mark.parametrize("name", NAMES)


def difference(ours, theirs):
    """The largest, against the largest of theirs."""
    return np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))


@names
def test_logits(name):
    logits, theirs = results(name)[0][:1], golden(name)["logits"]
    exact = slice(0, EXACT_TOKENS.get(name))
    assert difference(logits[:, exact], theirs[:, exact]) < TOLERANCE[name]
    assert difference(logits, theirs) < CHUNKED.get(name, TOLERANCE[name])


def mostly_slow(names, quick, reason):
    """Of names, all but the quick ones marked slow."""
    slow = pytest.mark.slow(reason=reason)
    return [pytest.param(x, marks=[] if x in quick else slow) for x in names]


@pytest.mark.parametrize(
    "name",
    mostly_slow(NAMES, {"fla_path"}, "a program for each; loading in bfloat16 is the same for all"),
)
def test_logits_in_bfloat16(name):
    """Parameters and computation in bfloat16; compared as in the contract, by all logits."""
    logits, _ = results(name, "bfloat16")
    tokens = slice(0, ROUTED_ALIKE.get(name))
    logits, theirs = logits[:1, tokens], golden(name)["logits"][:, tokens]
    assert np.linalg.norm(logits - theirs) < 2e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if "padded_ids" in golden(name)])
def test_left_padding(name):
    g = golden(name)
    shape, width = g["input_ids"].shape, g["padded_ids"].shape[1]
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    tokens[:, -width:], mask[:, -width:] = g["padded_ids"], g["padded_mask"]
    # As NumPy's, so that it is done before its arguments change below.
    logits = np.asarray(run(name, "float32")(tokens, mask)[0])[1, -width:]
    real = g["padded_mask"][1]
    theirs = g["padded_logits"][0][real]
    if name == "fla_log_linear":
        # fla's padding takes positions, which are levels; here a row is as without padding.
        count = real.sum()
        tokens[1, :count], mask[1] = g["padded_ids"][1][real], np.arange(shape[1]) < count
        theirs = np.asarray(run(name, "float32")(tokens, mask)[0])[1, :count]
    ours = logits[real]
    assert difference(ours, theirs) < CHUNKED.get(name, TOLERANCE[name])


def until_narrow(name, margins):
    """For each row, how many greedy tokens must be equal: up to the first that won narrowly."""
    narrow = margins < MARGIN.get(name, 1e-3)
    return [row.argmax() if row.any() else len(row) for row in narrow]


GREEDY = [name for name in NAMES if "greedy_cache" in golden(name)]


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        GREEDY, {"fla_kda", "kimi_linear"}, "two programs for each; the cache is the layer's"
    ),
)
def test_greedy_tokens(name):
    """From the cache, and each from all tokens before it, here as there."""
    g, (model, params) = golden(name), loaded(name)
    prompt = g.get("prompt", g["input_ids"])
    cached = jla.hub.generate(model, params, prompt, max_new_tokens=20)
    theirs = g["greedy_cache"]
    margins = g.get("greedy_cache_margin", g.get("greedy_margin"))
    for row, count in enumerate(until_narrow(name, margins)):
        assert count > 4, "the golden tokens say little"
        np.testing.assert_array_equal(cached[row, :count], theirs[row, :count])
    # All in one call, left of which there is padding.
    full = "greedy_full" if "greedy_full" in g else "greedy"
    text = np.concatenate([prompt, g[full]], axis=1)
    rows, length = g["input_ids"].shape
    if text.shape[1] > length:
        return  # Kimi Linear's: no program for them, and the cache's tokens are the same
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    tokens[:, -text.shape[1] :], mask[:, -text.shape[1] :] = text, True
    logits = np.asarray(run(name, "float32")(tokens, mask)[0])[:, -21:-1]
    won = np.argmax(logits, axis=-1)
    for row, count in enumerate(until_narrow(name, g[full + "_margin"])):
        np.testing.assert_array_equal(won[row, :count], g[full][row, :count])
    if "greedy_full_logits" in g:
        assert difference(logits, g["greedy_full_logits"]) < TOLERANCE[name]


@pytest.mark.slow(reason="two programs more; PaTH's cache is tested with its layer")
def test_generating_from_the_cache_is_the_whole_sequence():
    """Of PaTH, whose cut checkpoint has no golden tokens."""
    model, params = loaded("fla_path")
    prompt = golden("fla_path")["input_ids"][:, :80]
    tokens = jla.hub.generate(model, params, prompt, max_new_tokens=20)
    text = np.concatenate([prompt, tokens], axis=1)
    logits, _ = run("fla_path", "float32")(text, np.ones(text.shape, bool))
    np.testing.assert_array_equal(np.argmax(logits[:, 79:-1], axis=-1), tokens)


def in_file(name, gradients):
    """Gradients by the names of the checkpoint's files, and in their form."""
    from jla.hub._saving import written

    model, _ = loaded(name)
    parameters = mapping.of_model(model, _configs.family(checkpoints.config(name)))
    tensors = written(parameters, mapping.flat(gradients))
    return {
        key: np.concatenate([part.reshape(-1) for part in x.make()]).reshape(x.shape)
        for key, x in tensors.items()
    }


# What transformers has in memory under another name than in its files.
IN_FILES = {
    "conv1d.weight": ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"],
    "forget_gate.": [""],
    "mlp.experts.gate_up_proj": [
        f"block_sparse_moe.experts.{i}.w{j}.weight" for i in range(8) for j in (1, 3)
    ],
    "mlp.experts.down_proj": [f"block_sparse_moe.experts.{i}.w2.weight" for i in range(8)],
    "mlp.": ["block_sparse_moe."],
}


def gradients_of(theirs, ours):
    """Our gradients, in one array, of what theirs is called."""
    if theirs in ours:
        return ours[theirs]
    part = next(part for part in IN_FILES if part in theirs)
    return np.concatenate([ours[theirs.replace(part, name)] for name in IN_FILES[part]])


@pytest.mark.parametrize("name", [name for name in NAMES if "loss" in golden(name)])
def test_gradients(name):
    g, ours = golden(name), in_file(name, results(name)[1])
    tolerance = OF_GRADIENTS.get(name, 1e-3)
    compared = 0
    for key in g:
        kind, _, theirs = key.partition("/")
        if kind == "grad_norm":
            norm = np.linalg.norm(gradients_of(theirs, ours))
            np.testing.assert_allclose(norm, g[key], rtol=tolerance, err_msg=key)
        elif kind == "grad":
            assert (
                difference(gradients_of(theirs, ours).reshape(g[key].shape), g[key]) < tolerance
            ), key
        elif kind == "grad_embedding":
            assert difference(ours[f"{EMBEDDING[name]}.embeddings.weight"], g[key]) < tolerance
        else:
            continue
        compared += 1
    assert compared > 20


EMBEDDING = {"fla_log_linear": "backbone", "fla_mesa": "model"}
