"""Imported before all else: says which packages are missing, and how to install them."""

import importlib.util

needed = ("jla", "matplotlib", "optax", "orbax", "rich")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(
        f"the examples need packages that are not installed: {', '.join(missing)}. In the folder "
        "that has pyproject.toml, `pip install -e '.[examples]'` installs them, and elsewhere "
        "`pip install 'jla[examples]'`."
    )
