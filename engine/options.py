"""Options as dataclass fields: what a field says of itself becomes its flag, check, help text and record.

    @dataclass(frozen=True)
    class Config(Options):
        batch_size: int = option(32, "samples per forward pass", low=1)

A new option is one field here and one line where it is used.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

Plain = int | float | str | bool | None | list[int] | list[float] | list[str]
OptionsT = TypeVar("OptionsT", bound="Options")


class OptionError(ValueError):
    """A value that an option cannot take.

    Attributes:
        field: name of the option.
        value: what was given.
        rule: what may be given, in words.
    """

    def __init__(self, name: str, value: object, rule: str) -> None:
        super().__init__(f"{name} is {value!r}: {rule}")
        self.field, self.value, self.rule = name, value, rule


@dataclass(frozen=True)
class Spec:
    """What an option says of itself; see `option`."""

    help: str
    flag: str | None
    low: float | None
    above: float | None
    high: float | None
    choices: Collection[str] | None
    may_be_empty: bool
    fixed: bool


def option(
    default: Any,  # noqa: ANN401
    help: str,  # argparse's word for it
    *,
    flag: str | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Collection[str] | None = None,
    may_be_empty: bool = False,
    fixed: bool = True,
) -> Any:  # noqa: ANN401
    """A dataclass field that is an option.

    Args:
        default: its value where none is given; dataclasses.MISSING for an option that must be given.
        help: one line for people.
        flag: name of the command-line flag, if it is not the field's.
        low, above, high: the smallest value, the value it must exceed, the largest. Numbers must be finite.
        choices: the values it may have, such as the keys of a table; those of a Literal need no mention.
        may_be_empty: whether a tuple may be.
        fixed: whether a resumed run must go on with the value it began with.
    """
    return field(
        default=default, metadata={"spec": Spec(help, flag, low, above, high, choices, may_be_empty, fixed)}
    )


class Options:
    """Base of frozen dataclasses whose fields are options; checks every value when built."""

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        for name, spec in specs(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            _check(name, getattr(self, name), kinds[name], spec)

    def to_dict(self) -> dict[str, Plain]:
        """Plain values, as JSON and checkpoints hold them."""
        values = {name: getattr(self, name) for name in specs(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The inverse of `to_dict`; what is missing, as in files of older versions, has its default.

        Raises:
            ValueError: a name that is not known here, or a wrong value (OptionError).
        """
        unknown = set(values) - set(specs(cls))
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}: the file is from a newer version")
        return cls(**values)


def specs(kind: type[Options]) -> dict[str, Spec]:
    """The options of a class by name."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every subclass is a dataclass
    return {one.name: one.metadata["spec"] for one in fields if "spec" in one.metadata}


def flag_of(kind: type[Options], name: str) -> str:
    """The command-line flag of an option, without dashes."""
    return specs(kind)[name].flag or name


def choices_of(kind: type[Options], name: str) -> tuple[str, ...]:
    """The values of an option that has a closed list of them, or ()."""
    return _kinds(kind)[name].choices


# ------------------------------------------------------------------------------------------------ flags


def add_flags(
    group: argparse._ActionsContainer,
    kind: type[Options],
    *,
    skip: Sequence[str] = (),
    defaults: Mapping[str, object] = types.MappingProxyType({}),
) -> None:
    """Give a parser a flag for every option of a class, with its help text, type, choices and default.

    Args:
        group: a parser or a group of one.
        kind: the class.
        skip: options without a flag.
        defaults: other defaults than the fields', by option.
    """
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        if "spec" not in one.metadata or one.name in skip:
            continue
        spec: Spec = one.metadata["spec"]
        form = _kinds(kind)[one.name]
        default = defaults.get(one.name, one.default)
        keywords: dict[str, Any] = {"default": default, "help": spec.help.replace("%", "%%")}
        if form.of is bool:
            keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            keywords |= {"type": form.of, "choices": form.choices or None}
            keywords["nargs"] = ("*" if spec.may_be_empty else "+") if form.many else None
            if default not in (None, dataclasses.MISSING):
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                keywords["help"] += f" (default: {shown})".replace("%", "%%")
        group.add_argument(f"--{flag_of(kind, one.name)}", **keywords)


def from_args(kind: type[OptionsT], args: argparse.Namespace, **given: object) -> OptionsT:
    """The options of a class from parsed flags; `given` by name win over them.

    Raises:
        OptionError: a value out of range.
    """
    values = {
        name: getattr(args, flag_of(kind, name)) for name in specs(kind) if hasattr(args, flag_of(kind, name))
    }
    return kind(**{**values, **given})


def with_flag(error: OptionError, kinds: Sequence[type[Options]]) -> str:
    """The message of an error, naming the flag where the option has one."""
    flag = next((flag_of(kind, error.field) for kind in kinds if error.field in specs(kind)), None)
    return str(error) if flag is None else f"--{flag} is {error.value!r}: {error.rule}"


# ------------------------------------------------------------------------------------------------ types


class _Kind(typing.NamedTuple):
    """What an annotation allows: the type of one value, a closed list of values, a tuple of them, None."""

    of: type
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False


def _kinds(kind: type[Options]) -> dict[str, _Kind]:
    hints = typing.get_type_hints(kind)
    kinds = {name: _kind(hints[name]) for name in specs(kind)}
    tables = {name: tuple(spec.choices) for name, spec in specs(kind).items() if spec.choices is not None}
    return {name: one._replace(choices=tables.get(name, one.choices)) for name, one in kinds.items()}


def _kind(annotation: Any) -> _Kind:  # noqa: ANN401  # annotations have no type of their own
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = next(one for one in arguments if one is not type(None))
        return _kind(inner)._replace(optional=True)
    if origin is tuple:
        return _kind(arguments[0])._replace(many=True)
    if origin is typing.Literal:
        return _Kind(type(arguments[0]), arguments)
    return _Kind(annotation)


def _check(name: str, value: object, kind: _Kind, spec: Spec) -> None:
    """Raise OptionError for a value of another type, outside its range, or not in its list."""
    if value is None and kind.optional:
        return
    if kind.many and not (isinstance(value, tuple) and (value or spec.may_be_empty)):
        raise OptionError(name, value, "give one value or more")
    for one in typing.cast(tuple[object, ...], value) if kind.many else (value,):
        if kind.choices and one not in kind.choices:
            raise OptionError(name, value, f"choose one of {', '.join(map(str, kind.choices))}")
        if kind.of in (int, float) and not _in_range(one, kind.of, spec):
            raise OptionError(name, value, _rule(kind.of, spec))
        if kind.of in (str, bool) and not isinstance(one, kind.of):
            raise OptionError(name, value, f"give a {kind.of.__name__}")


def _in_range(value: object, of: type, spec: Spec) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if of is int else int | float):
        return False
    return (
        math.isfinite(value)
        and (spec.low is None or value >= spec.low)
        and (spec.above is None or value > spec.above)
        and (spec.high is None or value <= spec.high)
    )


def _rule(of: type, spec: Spec) -> str:
    """The range in words."""
    limits = [
        text
        for limit, text in (
            (spec.low, f"of at least {spec.low}"),
            (spec.above, f"above {spec.above}"),
            (spec.high, f"of at most {spec.high}"),
        )
        if limit is not None
    ]
    return " ".join([f"give a {'whole ' if of is int else ''}number", " and ".join(limits)]).strip()
