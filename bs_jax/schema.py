"""What a field of a config may hold, said with its type: nested data is read and written by it."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from bs_jax.errors import UserError

LARGEST = 2**63  # beyond it no number of a recipe has a meaning, nor an array of numpy's


def choose(what: str, name: Any, known: Iterable[str]) -> None:
    """Raise a UserError that suggests the nearest name unless `name` is a known one."""
    known = tuple(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")


def unknown_field(path: str, known: Iterable[str]) -> UserError:
    """The error for a field that a config does not have.

    Args:
        path: dotted name of the field.
        known: the fields beside it.
    """
    near = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return UserError(f"config has no field {path!r}; {hint}")


class Kind(NamedTuple):
    """What a field may hold: in words, and the reader that returns the value or raises."""

    holds: str
    read: Callable[[str, Any], Any]


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """Whether a value is True or False."""
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that an array can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not isinstance(value, int) or abs(value) < LARGEST


def is_whole(value: Any) -> bool:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(holds: str, fits: Callable[[Any], bool]) -> Kind:
    """What fits, as it is."""

    def read(path: str, value: Any) -> Any:
        if not fits(value):
            raise UserError(f"{path} is {value!r:.80}; it must be {holds}")
        return value

    return Kind(holds, read)


def list_of(holds: str, fits: Callable[[Any], bool], length: int | None = None) -> Kind:
    """A tuple of what fits; of a given length, where there is one."""

    def all_fit(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and (length is None or len(value) == length)
            and all(map(fits, value))
        )

    whole = _plain(holds, all_fit)
    return Kind(holds, lambda path, value: tuple(whole.read(path, value)))


def bounded(fits: Callable[[Any], bool], bounds: str) -> Kind:
    """A number with bounds, given in words after "it must be"."""

    def read(path: str, value: Any) -> Any:
        NUMBER.read(path, value)
        if not fits(value):
            raise UserError(f"{path} is {value!r}; it must be {bounds}")
        return value

    return Kind(NUMBER.holds, read)


def one_of(known: tuple[str, ...]) -> Kind:
    """One of the known texts."""

    def read(path: str, value: Any) -> Any:
        _TEXT.read(path, value)
        choose(path, value, known)
        return value

    return Kind(_TEXT.holds, read)


def _section(cls: type[Section]) -> Kind:
    holds = "a section of fields"
    mapping = _plain(holds, lambda value: isinstance(value, Mapping))
    return Kind(holds, lambda path, value: cls(**read_fields(cls, mapping.read(path, value), path)))


NUMBER = _plain("a number below 2**63", is_number)
_TEXT = _plain("a text", is_text)
_FLAG = _plain("True or False", is_flag)
# What a field holds, said with its type: `read_fields` reads a section by these.
Text = Annotated[str, _TEXT]
Flag = Annotated[bool, _FLAG]
Number = Annotated[float, NUMBER]
Numbers = Annotated[tuple[float, ...], list_of("a list of numbers", is_number)]
Positive = Annotated[int, bounded(lambda v: is_whole(v) and v >= 1, "a whole number of at least 1")]
Count = Annotated[int, bounded(lambda v: is_whole(v) and v >= 0, "a whole number of at least 0")]
Share = Annotated[float, bounded(lambda v: 0 <= v <= 1, "at least 0 and at most 1")]
Decay = Annotated[float, bounded(lambda v: 0 <= v < 1, "at least 0 and below 1")]


class Section:
    """A frozen dataclass that is read from nested data by the types of its fields."""


@functools.cache
def kinds_of(cls: type[Section]) -> dict[str, Kind]:
    """What each field of a section may hold; of fields that the section's owner reads, nothing."""
    kinds = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kinds[name] = get_args(hint)[1]
        elif isinstance(hint, type) and issubclass(hint, Section):
            kinds[name] = _section(hint)
    return kinds


def read_fields(
    cls: type[Section], content: Mapping[str, Any], path: str = "config", skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read the fields of a section; an absent one is left to its default, where it has one.

    Args:
        cls: the section's dataclass, whose fields say what they hold.
        content: nested data.
        path: of the section.
        skip: fields that the caller reads.
    """
    values: dict[str, Any] = {}
    kinds = {name: kind for name, kind in kinds_of(cls).items() if name not in skip}
    for name in content:
        if name not in kinds and name not in skip:
            raise unknown_field(f"{path}.{name}".removeprefix("config."), kinds)
    for name, kind in kinds.items():
        if name in content:
            values[name] = kind.read(f"{path}.{name}", content[name])
        elif not hasattr(cls, name):  # where a dataclass keeps a field's default
            raise UserError(f"{path}.{name} is missing; it holds {kind.holds}")
    return values


def written(value: Any, cls: type[Section] | None = None) -> Any:
    """What `read_fields` reads, as nested data that JSON can hold; of a section, what `cls` has.

    A field with a default came later than the first records: it is left out where it has that
    value, so that what was recorded before it keeps its name.
    """
    if isinstance(value, Section):
        cls = cls or type(value)
        found = {name: getattr(value, name) for name in kinds_of(cls)}
        return {
            name: written(item)
            for name, item in found.items()
            if not hasattr(cls, name) or item != getattr(cls, name)
        }
    if isinstance(value, tuple):
        return [written(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
