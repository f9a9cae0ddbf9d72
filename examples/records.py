"""What a run keeps of itself: the settings in its checkpoints, the lines of metrics.jsonl."""

import json
import os
import zlib

import processes
from command_line import InputError, writing

# What changes the numbers of a run, and what of it a run can be continued with otherwise.
SETTINGS = ("steps", "batch", "length", "lr", "weight_decay", "seed")
MODEL_SETTINGS = ("mixer", "width", "depth", "heads", "dtype")
CHANGEABLE = ("steps", "batch", "lr", "weight_decay")


def describe(options, text):
    """Returns the settings that a checkpoint keeps."""
    values = vars(options)
    return {
        "model": {name: values[name] for name in MODEL_SETTINGS},
        "training": {name: values[name] for name in SETTINGS} | {"text_crc32": zlib.crc32(text)},
    }


def check_settings(saved, wanted, step):
    """Returns what differs between a checkpoint's settings and those wanted, in words.

    Raises:
      InputError: a run cannot be continued with such a difference.
    """
    changed, refused = [], []
    for part in wanted:
        for name, value in wanted[part].items():
            if saved[part].get(name) != value:
                option = "the text" if name == "text_crc32" else "--" + name.replace("_", "-")
                differences = changed if name in CHANGEABLE else refused
                differences.append(f"{option} ({saved[part].get(name)}, now {value})")
    if refused:
        raise InputError(
            f"the checkpoint of step {step} was made with other settings: {', '.join(refused)}; "
            "--steps, --batch, --lr and --weight-decay can change, no others"
        )
    if wanted["training"]["steps"] < step:
        raise InputError(
            f"--steps {wanted['training']['steps']} is less than the {step} steps of the checkpoint"
        )
    return changed


class Metrics:
    """The lines of metrics.jsonl, one JSON object each."""

    def __init__(self, path, first_step):
        """Keeps the lines of steps up to `first_step`: a resumed run repeats the later ones.

        Raises:
          InputError: a line that is to be kept is damaged.
        """
        self.path, self.lines = path, []
        if not processes.is_first():
            return
        if not first_step or not path.exists():
            path.write_bytes(b"")
            return
        kept = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # a full disk, or the end of a process, cut it off
                break
            try:
                values = json.loads(line)
                later = values["step"] > first_step
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}: line {len(self.lines) + 1} is damaged; correct it, or move the file "
                    "away"
                ) from None
            if later:
                break
            self.lines.append(values)
            kept += len(line)
        # The file is cut, not written again: this works on a full disk, too.
        os.truncate(path, kept)

    def write(self, **line):
        if not processes.is_first():
            return
        self.lines.append(line)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
