"""The docs keep pace with the files: the map is complete, and what docs name is there."""

import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated

import jla
import jla.hub
import jla.linen
import jla.models
import jla.pallas

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# The notebook says what was true on its dates; the files that it names may have moved since.
TODAY = [page for page in PAGES if DOCS / "notebook" not in page.parents]
KERNELS = sorted(page for page in (DOCS / "kernels").glob("*.md") if page.stem != "README")
HEADINGS = ["Formulas", "Kernels", "Design", "Precision", "Known limits"]

# Files that the docs name already, and that are on their way to that place. Delete what is there.
PLANNED = set()

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
pages_of_today = pytest.mark.parametrize("page", TODAY, ids=lambda p: str(p.relative_to(ROOT)))


def code(page):
    """What stands in code font on a page, in a line or in a block."""
    text = page.read_text()
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```.*?^```", text, re.M | re.S)


def paths(page):
    """The files and folders of this repository that a page names in code font."""
    named = " ".join(text for text in code(page) if "<" not in text)  # <name> stands for any
    found = re.findall(r"(?<![\w/.{])(?:jla|cases|tests|benchmarks|examples|docs)/[\w./*-]*", named)
    return {path.rstrip(".") for path in found}


def is_there(path):
    planned = path in PLANNED or any(name.startswith(path) for name in PLANNED)
    return planned or (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())


def test_the_map_has_every_file():
    mapped = re.findall(r"^- `(jla/[^`]+)`:", (DOCS / "map.md").read_text(), re.M)
    there = [str(p.relative_to(ROOT)) for p in (ROOT / "jla").rglob("*.py")] + ["jla/py.typed"]
    assert sorted(set(there) - set(mapped)) == []  # what has no bullet yet
    assert sorted(set(mapped) - set(there)) == []  # what has moved or gone
    assert len(mapped) == len(set(mapped))


def test_the_site_has_every_page():
    """mkdocs.yml lists them, and `PAGES` of docs/site/hooks.py those outside of docs/."""
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    hooks = (DOCS / "site" / "hooks.py").read_text()
    outside = dict(re.findall(r'^    "(\S+)": "(\S+\.md)",$', hooks, re.M))
    there = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*there, *outside.values()])
    assert [path for path in outside if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("module", [jla, jla.hub, jla.linen, jla.models, jla.pallas])
def test_the_reference_has_every_public_name(module):
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    there = set(re.findall(r"{heading: ([\w.]+)", pages)) | {"jla.hub.generate"}  # that of models
    things = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    assert {f"{module.__name__}.{name}" for name in things} - there == set()


@pages
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pages_of_today
def test_named_files_are_there(page):
    assert [path for path in sorted(paths(page)) if not is_there(path)] == []


@pages_of_today
def test_named_tests_are_there(page):
    for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        assert f"\ndef {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


def test_every_promise_of_the_contract_has_a_test():
    _, *sections = re.split(r"^## ", (DOCS / "contract.md").read_text(), flags=re.M)
    without = [text.splitlines()[0] for text in sections if "`tests/" not in text]
    assert without == [
        "The functions",
        "The mathematics",
        "Oldest and newest JAX",
        "Agreed, not there yet",
    ]


@pytest.mark.parametrize("page", KERNELS, ids=lambda page: page.stem)
def test_pages_of_kernels_are_short_and_alike(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert len(text.split()) < 1000


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def blocks_of_scale():
    return blocks_of("scale.md")


@pytest.mark.optax  # a user's settings
@pytest.mark.slow  # seven programs; tests/test_examples_serve.py has what they do
def test_the_examples_of_serving_run():
    names = {}
    exec("\n".join(blocks_of("serving.md")), names)  # which compares with `generate`
    assert len(names["text"]) == 10 and names["calls"] == 3
    np.testing.assert_allclose(names["packed"][0, :2], names["first"], atol=1e-4)


@pytest.mark.slow  # 17 s, and tests/contract/test_over_time.py has what they do
def test_the_examples_of_scale_run():
    """Both surfaces give the unsharded call's loss and gradients."""
    names = {}
    exec("\n".join(blocks_of_scale()[:2]), names)

    def loss(arrays):
        return jnp.mean(jla.kda(*arrays)[0] ** 2)

    want = jax.jit(jax.value_and_grad(loss))(tuple(map(np.asarray, names["arrays"])))
    for value, gradients in (("value", "gradients"), ("same_value", "same_gradients")):
        got = names[value], names[gradients]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), got, want)


@pytest.mark.slow  # two programs of a model; tests/linen/test_layer_mesh.py has what they do
def test_the_model_of_scale_runs():
    """On eight devices it has the loss and the gradients of one."""
    first, _, model = blocks_of_scale()
    names = {}
    exec(first.partition("\nmesh = ")[0] + model, names)
    module = names["model"].clone(mesh_axes=None)
    names["model"] = module  # what `model_loss` calls
    arrays = jax.device_get((names["params"], names["inputs"], names["targets"]))
    want = jax.jit(jax.value_and_grad(names["model_loss"]))(*arrays)
    got = jax.device_get((names["model_value"], names["model_gradients"]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), got, want)
    embedding = names["model_gradients"]["embed"]["embedding"]
    assert embedding.sharding.spec == jax.sharding.PartitionSpec("model", "data")


def test_start_here_has_what_readme_has():
    """Its commands to install and its program, which tests/test_examples_readme.py runs."""
    first = r"^```sh\n.*?^```", r"^```python\n.*?^```"
    for block in first:
        of_page, of_readme = (
            re.search(block, page.read_text(), re.M | re.S)[0]
            for page in (DOCS / "index.md", ROOT / "README.md")
        )
        assert of_page == of_readme


@pytest.mark.optax
@pytest.mark.slow  # three programs of a model
def test_the_examples_of_training_run():
    names = {}
    exec("\n".join(blocks_of("training.md")), names)
    assert np.isfinite(names["loss"])
    ids, counted = names["batch"][2], names["texts"]
    assert [int((ids == i).sum()) for i in range(3)] == [len(text) - 1 for text in counted]
    embedding = names["params"]["embed"]["embedding"]
    assert embedding.sharding.spec == jax.sharding.PartitionSpec(None, "data")


def test_the_example_of_long_prompts_runs():
    """NumPy evaluates it. What is read in chunks is what is read at once."""

    def run():
        names = {}
        (block,) = blocks_of("long_context.md")
        exec(block, names)
        whole, _ = names["read"](
            names["variables"]["params"], names["variables"]["cache"], names["prompt"]
        )
        return names["last"], whole

    last, whole = evaluated(jax.jit(run))()
    np.testing.assert_allclose(last, whole, atol=1e-5)


def test_the_example_of_gpus_runs():
    names = {}
    (block,) = blocks_of("gpus.md")
    exec(block, names)
    assert "compute capability 9.0" in names["reason"] or jax.default_backend() == "gpu"


@pytest.mark.optax
def test_the_examples_of_nnx_run():
    """NumPy evaluates them: XLA would compile for a minute. Decoding gives the parallel outputs."""

    def run():
        names = {}
        exec("\n".join(blocks_of("nnx.md")), names)
        return [names[name] for name in ("losses", "logits", "prompt", "last", "y")]

    losses, logits, prompt, last, y = evaluated(jax.jit(run))()
    assert losses[2] < losses[0] and y.shape == (1, 4, 32)
    np.testing.assert_allclose(np.concatenate([prompt, last], axis=1), logits, atol=1e-5)


def test_what_is_planned_is_not_there_yet():
    assert [path for path in sorted(PLANNED) if (ROOT / path).exists()] == []
