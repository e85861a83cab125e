"""Options as dataclass fields, from which flags, checks, help texts and records are derived.

@dataclass(frozen=True)
class Config(Options):
    batch_size: int = option(32, "samples per forward pass", low=1)
"""

import argparse
import dataclasses
import inspect
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

Plain = int | float | str | bool | None | list[int] | list[float] | list[str]
P = ParamSpec("P")
OptionsT = TypeVar("OptionsT", bound="Options")


class OptionError(ValueError):
    """`field` cannot take `value`; `rule` says what it can."""

    def __init__(self, name: str, value: object, rule: str) -> None:
        super().__init__(f"{name} is {value!r}: {rule}")
        self.field, self.value, self.rule = name, value, rule


def one_line(error: BaseException) -> str:
    """Join the lines of a message, or name the kind of error where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class Spec(NamedTuple):
    """Holds what is known of an option beside its name and type."""

    default: Any  # dataclasses.MISSING if it must be given
    help: str
    flag: str | None = None  # if not the field's name; "": it has none
    low: float | None = None  # the smallest value
    above: float | None = None  # what the value must exceed
    high: float | None = None  # the largest value
    choices: Collection[str] | None = None  # if the type is no Literal
    may_be_empty: bool = False  # a tuple
    fixed: bool = True  # a resumed run must keep it
    path: bool = False  # made absolute, so that a run can be resumed from another folder
    rare: bool = False  # shown by --help-all alone
    script: Any = None  # the default of the flag, if it differs

    def differs(self) -> bool:
        """Tell whether a flag that is not given means something else than the default of the class."""
        return self.script is not None or self.path

    def of_flag(self) -> Any:  # noqa: ANN401
        """Return the value of a flag that is not given."""
        default = self.default if self.script is None else self.script
        return os.path.abspath(default) if self.path and default else default

    def limits(self) -> list[tuple[float, Callable[[float, float], bool], str]]:
        every = (
            (self.low, operator.ge, "of at least"),
            (self.above, operator.gt, "above"),
            (self.high, operator.le, "of at most"),
        )
        return [(limit, holds, words) for limit, holds, words in every if limit is not None]


def option(default: Any, help: str, **rules: Any) -> Any:  # noqa: ANN401
    """A dataclass field that is an option; `rules` are fields of Spec."""
    return field(default=default, metadata={"spec": Spec(default, help, **rules)})


def rare_option(default: Any, help: str, **rules: Any) -> Any:  # noqa: ANN401
    """An option that --help leaves out, and --help-all shows."""
    return option(default, help, rare=True, **rules)


def narrowed(kind: type["Options"], name: str) -> Any:  # noqa: ANN401
    """An option of `kind` again, for a subclass whose annotation leaves out None."""
    return field(default=specs(kind)[name].default, metadata={"spec": specs(kind)[name]})


class Options:
    """Frozen dataclasses of options, checked when built.

    `retired` has the options of former versions that recorded settings may still name, each with the one
    value that this version can follow.
    """

    retired: ClassVar[Mapping[str, Plain]] = {}

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        for name, spec in specs(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            _check(name, getattr(self, name), kinds[name], spec)

    def to_dict(self) -> dict[str, Plain]:
        """Return plain values, for JSON and checkpoints."""
        values = {name: getattr(self, name) for name in specs(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of(cls, **given: Any) -> Self:  # noqa: ANN401  # any option
        """Build it from what a user gave; a class may have other values than its defaults for the rest."""
        return cls(**given)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build it from recorded values, defaults for what is missing; ValueError names what is unknown."""
        for name in values.keys() & cls.retired.keys():
            if values[name] != cls.retired[name]:
                raise OptionError(name, values[name], "no option any more: use the version it is of")
        unknown = values.keys() - specs(cls).keys() - cls.retired.keys()
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}: the file is from a newer version")
        return cls(**{name: value for name, value in values.items() if name not in cls.retired})


def takes_fields_of(
    kind: Callable[P, OptionsT],
) -> Callable[[Callable[[Any, OptionsT], None]], Callable[Concatenate[Any, P], None]]:
    """Let a constructor that takes `kind` be called, and be shown by an editor, with the fields of `kind`."""

    def decorate(build: Callable[[Any, OptionsT], None]) -> Callable[Concatenate[Any, P], None]:
        def construct(self: Any, /, *values: P.args, **options: P.kwargs) -> None:  # noqa: ANN401
            build(self, kind(*values, **options))

        parameters = inspect.signature(kind).parameters.values()
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        construct.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        return construct

    return decorate


def specs(kind: type[Options]) -> dict[str, Spec]:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every subclass is a dataclass
    return {one.name: one.metadata["spec"] for one in fields if "spec" in one.metadata}


def flag_of(kind: type[Options], name: str) -> str:
    """Return the flag of an option, without dashes; "" if it has none."""
    flag = specs(kind)[name].flag
    return name if flag is None else flag


def add_flags(
    group: argparse._ActionsContainer,
    kind: type[Options],
    *,
    skip: Sequence[str] = (),
    given_only: bool = False,
    show_rare: bool = True,
) -> None:
    """Add a flag for every option but `skip`; `given_only`: those that are not given have no value."""
    for name, spec in specs(kind).items():
        if name in skip or not (flag := flag_of(kind, name)):
            continue
        form, default = _kinds(kind)[name], spec.of_flag()
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS if given_only else default}
        shown = spec.help
        if form.of is bool:
            keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            of = _or_auto(form.of) if form.optional and form.of in (int, float) else form.of
            keywords |= {"type": _absolute if spec.path else of, "choices": form.choices or None}
            keywords["nargs"] = ("*" if spec.may_be_empty else "+") if form.many else None
            if default not in (None, dataclasses.MISSING):
                shown += f" (default: {' '.join(map(str, default)) if form.many else default})"
        keywords["help"] = argparse.SUPPRESS if spec.rare and not show_rare else shown.replace("%", "%%")
        group.add_argument(f"--{flag}", **keywords)


def path(text: str) -> str:
    """Expand ~ as a shell would; ValueError for an empty name. Argparse's `type` of a path."""
    if not text:
        raise ValueError("a path is empty: give one, or leave the flag out")
    return os.path.expanduser(text)


def _absolute(text: str) -> str:
    return os.path.abspath(path(text))


def _or_auto(of: type) -> Callable[[str], object]:
    """Make the parser of a number, or of "auto", which is None."""

    def parse(text: str) -> object:
        return None if text == "auto" else of(text)

    parse.__name__ = of.__name__  # what argparse says was expected
    return parse


def from_args(kind: type[OptionsT], args: argparse.Namespace, **given: object) -> OptionsT:
    """Build options from parsed flags, of which `given` takes the place; OptionError."""
    values = {
        name: getattr(args, flag_of(kind, name)) for name in specs(kind) if hasattr(args, flag_of(kind, name))
    }
    return kind(**{**values, **given})


class _Kind(NamedTuple):
    """Holds what an annotation allows."""

    of: type
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False


def _kinds(kind: type[Options]) -> dict[str, _Kind]:
    hints = typing.get_type_hints(kind)
    kinds = {name: (_kind(hints[name]), spec.choices) for name, spec in specs(kind).items()}
    return {
        name: one if choices is None else one._replace(choices=tuple(choices))
        for name, (one, choices) in kinds.items()
    }


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
    if value is None and kind.optional:
        return
    if kind.many and not (isinstance(value, tuple) and (value or spec.may_be_empty)):
        raise OptionError(name, value, "give one value or more")
    for one in typing.cast(tuple[object, ...], value) if kind.many else (value,):
        if kind.choices and one not in kind.choices:
            raise OptionError(name, value, f"choose one of {', '.join(map(str, kind.choices))}")
        if kind.of in (int, float) and not _in_range(one, kind.of, spec):
            range_in_words = " and ".join(f"{words} {limit}" for limit, _, words in spec.limits())
            number = "whole number" if kind.of is int else "number"
            raise OptionError(name, value, f"give a {number} {range_in_words}".strip())
        if kind.of in (str, bool) and not isinstance(one, kind.of):
            raise OptionError(name, value, f"give a {kind.of.__name__}")


def _in_range(value: object, of: type, spec: Spec) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if of is int else int | float):
        return False
    return math.isfinite(value) and all(holds(value, limit) for limit, holds, _ in spec.limits())
