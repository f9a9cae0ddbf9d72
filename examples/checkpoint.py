"""Checkpoints with orbax: the training state, and beside it the settings that made it.

Each checkpoint also holds CHECKSUMS of its files, for orbax reads some kinds of damage as other
numbers. A checkpoint is read only if they fit.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from command_line import InputError, writing
from processes import is_first

# orbax reports every step it takes, and prints the tracebacks of the errors that it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

CHECKSUMS = "checksums.json"


def _without_echoes(unraisable, report=sys.unraisablehook):
    """Omits what follows from an error that orbax has raised.

    It closes its event loop at the first error. The other reads and writes, in tensorstore's
    threads, then cannot report their end, and each one would print a traceback that says so.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        report(unraisable)


sys.unraisablehook = _without_echoes


def open_manager(directory, *, keep=2, read_only=False):
    """Opens the checkpoints under `directory`.

    To write, by one run alone, in all of its processes: the folder is made if it is missing, and
    what a killed process left unfinished is deleted.
    """
    # Synchronous, for the next training step donates the arrays that are being written.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
    )
    with writing(_path(directory)):
        return ocp.CheckpointManager(_path(directory), options=options)


def save(manager, step, state, settings):
    """Writes the state (a tree of arrays) and the settings, dicts under "model" and "training".

    Raises:
      InputError: it cannot be written, as on a full disk. Nothing is left of it.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
    )
    path = pathlib.Path(manager.directory) / str(step)
    try:
        manager.save(step, args=args)
        if is_first():
            (path / CHECKSUMS).write_text(json.dumps(_checksums(path)))
    except BaseException as error:
        if is_first():
            _remove_unfinished(path)
        if not isinstance(error, Exception):
            raise
        kept = [other for other in _steps(path.parent) if other != step]
        last = f"the last one is of step {kept[-1]}" if kept else "there is no earlier one"
        raise InputError(f"cannot write the checkpoint {path}: {_reason(error)}; {last}") from error


def delete_after(directory, step):
    """Deletes the checkpoints of later steps; 0 deletes all."""
    for later in _steps(_path(directory)):
        if later > step:
            with writing(_path(directory)):
                shutil.rmtree(_path(directory) / str(later))


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


def find_step(directory, step=None, *, flag):
    """Returns the checkpoint step to read: `step`, or the latest there is.

    Raises:
      InputError: there is no such checkpoint, or it is damaged. `flag` is the program's option that
        names a step, for the message to say how to read an older one.
    """
    path = _path(directory)
    steps = _steps(path)
    if not steps:
        raise InputError(f"no checkpoint in {directory}; train_lm.py --out {directory} makes one")
    if step is not None and step not in steps:
        raise InputError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    step = steps[-1] if step is None else step
    damage = _damage(path / str(step))
    if damage:
        whole = [s for s in steps if s < step and not _damage(path / str(s))]
        older = (
            f"the one of step {whole[-1]} is whole: {flag} {whole[-1]} reads it"
            if whole
            else "there is no older one that is whole"
        )
        raise InputError(
            f"cannot read the checkpoint {path / str(step)}: it is damaged ({damage}); {older}"
        )
    return step


def holds_checkpoint(directory):
    return bool(_steps(_path(directory)))


def _path(directory):
    return pathlib.Path(directory).absolute() / "checkpoints"


def _steps(path):
    """The steps of which there is a checkpoint, in their order."""
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def _checksums(path):
    """The SHA-256 of each file of a checkpoint but CHECKSUMS."""
    sums = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / CHECKSUMS:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256")
            sums[str(file.relative_to(path))] = digest.hexdigest()
    return sums


def _damage(path):
    """Says what is wrong with the files of a checkpoint; None if nothing is."""
    try:
        wanted = dict(json.loads((path / CHECKSUMS).read_text()))
        found = _checksums(path)
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}, which train_lm.py writes last"
    except OSError as error:
        return _reason(error)
    except (ValueError, TypeError):
        return f"{CHECKSUMS} has changed"
    parts = [
        f"{name} {'has changed' if name in found else 'is missing'}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    more = f", as {len(parts) - 1} more files" if len(parts) > 1 else ""
    return parts[0] + more if parts else None


def _reason(error):
    """One line of an error of orbax or tensorstore; of one of the operating system, its words."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number or (isinstance(error, OSError) and error.errno):
        return os.strerror(int(number[1]) if number else error.errno)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _remove_unfinished(path):
    """Removes what `save` began. Its threads can go on for a moment, and make a folder again."""
    for pause in (0, 0.1, 0.2, 0.4):
        time.sleep(pause)
        for left in (path, *path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*")):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _explained(manager, step):
    # What does not fit the model can raise almost anything, from JSON's errors to tensorstore's.
    try:
        yield
    except Exception as error:
        raise InputError(
            f"cannot read the checkpoint {manager.directory / str(step)}: it is not one of "
            f"train_lm.py's, or of another version ({_reason(error)})"
        ) from error
