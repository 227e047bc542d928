"""Values of a configuration file: checked one by one, and named in one sentence where they are wrong."""

import dataclasses
import difflib
import fractions
import re

from ..certification.identity import short_name


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def check_mapping(values, kind, where):
    """The entries of a mapping, all of them fields of a dataclass and none of those without a default missing."""
    if not isinstance(values, dict):
        raise ValueError(f"`{where}` must be a mapping, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            meant = f": did you mean `{near[0]}`?" if near else f", must be one of {', '.join(fields)}"
            raise ValueError(f"`{where}` has an unknown key `{key}`{meant}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and values.get(name) is None:
            raise ValueError(f"`{where}` must have `{name}`, got none")
    return dict(values)


def check_one_of(value, allowed, where):
    """Raise `ValueError` unless a value is one of those allowed; the nearest is named."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"`{where}` must be one of {', '.join(allowed)}, got {value!r}{meant}")


def check_list(values, where):
    """The values, or `ValueError` unless they are a list with an entry."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"`{where}` must be a list with at least one entry, got {values!r}")
    return values


def is_int(value):
    """Whether a value is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(value, where, least):
    """Raise `ValueError` unless a value is `None` or an integer of at least `least`."""
    if value is not None and (not is_int(value) or value < least):
        raise ValueError(f"`{where}` must be an integer >= {least}, got {value!r}")


def read_number(value, where):
    """A number, or a fraction as text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(fractions.Fraction(value)) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"`{where}` must be a number or a fraction such as 16/255, got {value!r}") from None


def substitute(values, variables):
    """The values with `${NAME}` of their texts replaced, or `ValueError` where a variable is not given."""
    if isinstance(values, dict):
        return {key: substitute(value, variables) for key, value in values.items()}
    if isinstance(values, list):
        return [substitute(value, variables) for value in values]
    if not isinstance(values, str):
        return values

    def replace(found):
        if found[1] not in variables:
            raise ValueError(f"`--set {found[1]}=VALUE` must be given, this configuration uses ${{{found[1]}}}")
        return str(variables[found[1]])

    return _VARIABLE.sub(replace, values)


def shorten(values):
    """JSON-safe values with folders by their last name."""
    if isinstance(values, dict):
        return {key: shorten(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [shorten(value) for value in values]
    return short_name(values) if isinstance(values, str) else values
