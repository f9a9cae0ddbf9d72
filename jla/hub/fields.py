"""The fields of a config.json: those that are honoured, those without effect, and all others."""

import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

# Of every config, without effect on the mathematics.
GENERAL = {
    *("architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
    *("is_decoder", "keys_to_ignore_at_inference", "max_position_embeddings", "model_type"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "return_dict", "torch_dtype"),
    *("transformers_version", "unk_token_id", "use_cache", "_name_or_path"),
}


class Kind(NamedTuple):
    """The values that a field can have."""

    words: str
    accepts: Callable[[Any], bool]

    def or_none(self) -> "Kind":
        return Kind(f"{self.words} or null", lambda x: x is None or self.accepts(x))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


COUNT = Kind("a positive integer", lambda x: type(x) is int and x > 0)
COUNT_OR_ZERO = Kind("a non-negative integer", lambda x: type(x) is int and x >= 0)
POSITIVE = Kind("a positive number", lambda x: _is_number(x) and x > 0)
NEGATIVE = Kind("a negative number", lambda x: _is_number(x) and x < 0)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
ANY = Kind("anything", lambda x: True)  # what a family checks by itself


def one_of(*values: Any) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda x: x in values)


class Fields(NamedTuple):
    """A table of a family's fields.

    Attributes:
      honoured: their kind, and the value where a config has none, as the original sets it.
      fixed: the only values that are accepted; the first is that where a config has none.
      without_effect: on the mathematics, beside GENERAL.
      other_names: of fields, to the name in this table.
    """

    honoured: Mapping[str, tuple[Kind, Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    without_effect: Collection[str]
    other_names: Mapping[str, str] = types.MappingProxyType({})


def read(
    config: Mapping[str, Any],
    fields: Fields,
    check: Callable[[Any, list[str]], None] = lambda settings, wrong: None,
) -> Any:
    """The honoured fields' values, as attributes.

    Args:
      check: of values that must fit one another; it adds to its second argument what is wrong.

    Raises:
      ValueError: with the name of every field that cannot be honoured.
    """
    wrong: list[str] = []
    named: dict[str, Any] = {}
    for name, value in config.items():
        known = fields.other_names.get(name, name)
        if named.setdefault(known, value) != value:
            wrong.append(f"{name} is {value!r}, but {known} is {named[known]!r}")
    settings = types.SimpleNamespace()
    for name, (kind, default) in fields.honoured.items():
        setattr(settings, name, named.get(name, default))
        if not kind.accepts(named.get(name, default)):
            wrong.append(f"{name} is {named.get(name)!r} and must be {kind.words}")
    for name, accepted in fields.fixed.items():
        value = named.get(name, accepted[0])
        if not any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in accepted):
            shown = " or ".join(map(repr, accepted))
            wrong.append(f"{name} is {value!r}, of which only {shown} is supported")
    known = {*GENERAL, *fields.honoured, *fields.fixed, *fields.without_effect}
    for name in sorted(set(named) - known):
        wrong.append(f"{name} is {named[name]!r}, an unknown field")
    if not wrong:
        check(settings, wrong)
    if wrong:
        raise ValueError(
            f"config of a {config['model_type']} has fields that cannot be honoured "
            f"({len(wrong)}): {'; '.join(wrong)}. Remove a field from the dict if you know that "
            "it has no effect on the results"
        )
    return settings
