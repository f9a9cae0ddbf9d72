"""The checkpoints in models/, which the originals made, each unpacked, loaded and run once.

fla_*: fla 0.6.0's classes and kernels, on an H200, without TF32 in torch. kimi_linear: transformers
5.24, in torch on a CPU. All float32, two layers or four. golden.npz has tokens, the originals'
logits of row 0, of a padded row, of greedy decoding (the tokens, and by how much each has won), and
gradients of the mean loss. fla_path is cut to its first block: its logits are the last norm and the
head, in NumPy, of fla's own stream behind that block.

Files that end in .xz have the bytes of every four in four planes: all first bytes, all second, ...
"""

import functools
import json
import lzma
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from evaluator import evaluated

import jla.hub

FOLDERS = pathlib.Path(__file__).parent / "models"
NAMES = sorted(path.name for path in FOLDERS.iterdir())
# Where the definition, token by token, compiles faster than the chunks, with which the contract
# compares it.
IMPLEMENTATION = dict.fromkeys(("fla_kda", "fla_mesa", "kimi_linear"), "reference")
_UNPACKED = tempfile.TemporaryDirectory(prefix="jla-checkpoints-")


@functools.cache
def folder(name):
    """A checkpoint's folder, as the original wrote it."""
    there = pathlib.Path(_UNPACKED.name) / name
    shutil.copytree(FOLDERS / name, there)
    for packed in there.glob("*.xz"):
        planes = np.frombuffer(lzma.decompress(packed.read_bytes()), np.uint8)
        packed.with_suffix("").write_bytes(planes.reshape(4, -1).T.tobytes())
        packed.unlink()
    return there


@functools.cache
def golden(name):
    with np.load(FOLDERS / name / "golden.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def config(name):
    return jla.hub.read_config(folder(name))


@functools.cache
def loaded(name, dtype="float32"):
    """The model and its parameters."""
    model = jla.hub.model(config(name), param_dtype=dtype, implementation=IMPLEMENTATION.get(name))
    return model, jla.hub.load(folder(name), model)


@functools.cache
def run(name, dtype):
    """A function of tokens and a mask, both of the golden tokens' shape: logits and gradients.

    The gradients are of the mean loss, by the parameters; None where the original's are not there.
    """
    model, params = loaded(name, dtype)
    wanted = any(key.startswith("grad") for key in golden(name)) and dtype == "float32"

    def loss(params, tokens, mask):
        logits = model.apply({"params": params}, tokens, mask)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(own), logits

    def logits_and_gradients(params, tokens, mask):
        if not wanted:
            return loss(params, tokens, mask)[1], None
        gradients, logits = jax.grad(loss, has_aux=True)(params, tokens, mask)
        return logits, gradients

    # XLA compiles the models where they generate.
    return functools.partial(evaluated(jax.jit(logits_and_gradients)), params)


@functools.cache
def results(name, dtype="float32"):
    """Logits and gradients for the golden tokens."""
    tokens = golden(name)["input_ids"]
    return run(name, dtype)(tokens, np.ones(tokens.shape, bool))


def tensors(path):
    """A folder's tensors by name, as the package safetensors reads them."""
    from safetensors import safe_open

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def write_config(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))


def write_holes(path, shapes):
    """A file of float32 zeros, which take no place on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
