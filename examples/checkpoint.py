"""Checkpoints with orbax: the training state, and beside it the settings that made it."""

import contextlib
import logging
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from command_line import InputError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every step it takes


def open_manager(directory, *, keep=2):
    """Opens the checkpoints under `directory`, which is made if it is missing."""
    # Synchronous, for the next training step donates the arrays that are being written.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(_path(directory), options=options)


def save(manager, step, state, settings):
    """Writes the state (a tree of arrays) and the settings, dicts under "model" and "training"."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
        ),
    )


def load_settings(manager, step):
    """Reads what `save` was given as settings."""
    with _explained(manager, step):
        args = ocp.args.Composite(settings=ocp.args.JsonRestore())
        settings = manager.restore(step, args=args).settings
        return {part: settings[part] for part in ("model", "training")}


def load_state(manager, step, like):
    """Reads a state of the structure, shapes and dtypes of `like`."""
    with _explained(manager, step):
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=args).state


def load_params(manager, step, model):
    """Reads the parameters of a model, without the optimizer's moments."""
    with _explained(manager, step):
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
        )
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                {"params": params},
                restore_args=ocp.checkpoint_utils.construct_restore_args({"params": params}),
                partial_restore=True,
            )
        )
        return manager.restore(step, args=args).state["params"]


def find_step(directory, step=None):
    """Returns the checkpoint step to read: `step`, or the latest there is.

    Raises:
      InputError: there is no such checkpoint.
    """
    path = _path(directory)
    steps = sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []
    if not steps:
        raise InputError(f"no checkpoint in {directory}; train_lm.py --out {directory} makes one")
    if step is not None and step not in steps:
        raise InputError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    return steps[-1] if step is None else step


def _path(directory):
    return pathlib.Path(directory).absolute() / "checkpoints"


@contextlib.contextmanager
def _explained(manager, step):
    # A damaged file can raise almost anything, from JSON's errors to tensorstore's.
    try:
        yield
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f"cannot read the checkpoint {manager.directory / str(step)}: it is damaged or not "
            f"one of train_lm.py's ({type(error).__name__}: {first_line})"
        ) from error
