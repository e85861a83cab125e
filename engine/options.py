"""Options as dataclass fields, from which flags, checks, help texts and records are derived.

@dataclass(frozen=True)
class Config(Options):
    batch_size: int = option(32, "samples per forward pass", low=1)
"""

import argparse
import dataclasses
import functools
import inspect
import math
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
    """Holds all that is known of an option; the last three are from its annotation."""

    default: Any  # dataclasses.MISSING if it must be given
    help: str
    flag: str = ""  # without dashes; empty: as the field
    has_flag: bool = True
    low: float = -math.inf  # the smallest value
    above: float = -math.inf  # what the value must exceed
    high: float = math.inf  # the largest value
    choices: Collection[str] | None = None
    may_be_empty: bool = False  # a tuple
    fixed: bool = True  # a resumed run must keep it
    path: bool = False  # made absolute, so that a run can be resumed from another folder
    rare: bool = False  # shown by --help-all alone
    script: Any = None  # the default of the flag, if it differs
    of: type = str  # the kind of value, or of each in a tuple
    many: bool = False
    optional: bool = False

    def of_flag(self) -> Any:  # noqa: ANN401
        """Return the value of a flag that is not given."""
        default = self.default if self.script is None else self.script
        return os.path.abspath(default) if self.path and default else default

    def check(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Raise OptionError for what the option called `name` cannot be."""
        if value is None and self.optional:
            return
        if self.many and not (isinstance(value, tuple) and (value or self.may_be_empty)):
            raise OptionError(name, value, "give one value or more")
        for one in value if self.many else (value,):
            if self.choices is not None and one not in self.choices:
                raise OptionError(name, value, f"choose one of {', '.join(map(str, self.choices))}")
            if not self._allows(one):
                raise OptionError(name, value, f"give a {self._rule()}")

    def _allows(self, value: object) -> bool:
        if self.of not in (int, float):
            return isinstance(value, self.of)
        if isinstance(value, bool) or not isinstance(value, int if self.of is int else int | float):
            return False
        return math.isfinite(value) and self.above < value and self.low <= value <= self.high

    def _rule(self) -> str:
        kind = {int: "whole number", float: "number"}.get(self.of, self.of.__name__)
        limits = (("of at least", self.low), ("above", self.above), ("of at most", self.high))
        words = " and ".join(f"{word} {limit}" for word, limit in limits if math.isfinite(limit))
        return f"{kind} {words}".strip()


def option(default: Any, help: str, **rules: Any) -> Any:  # noqa: ANN401
    """A dataclass field that is an option; `rules` are fields of Spec."""
    return field(default=default, metadata={"spec": Spec(default, help, **rules)})


rare_option = functools.partial(option, rare=True)  # --help leaves it out, and --help-all shows it


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
        for name, spec in specs(type(self)).items():
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
            spec.check(name, getattr(self, name))

    def to_dict(self) -> dict[str, Plain]:
        """Return plain values, for JSON and checkpoints."""
        values = {name: getattr(self, name) for name in specs(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of(cls, **given: Any) -> Self:  # noqa: ANN401  # any option
        """Build it from the flags that a user gave, and what they are if they are not given."""
        return cls(**{**{name: spec.of_flag() for name, spec in specs(cls).items()}, **given})

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
    """List the options of a class by field."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every subclass is a dataclass
    plain = {one.name: one.metadata["spec"] for one in fields if "spec" in one.metadata}
    return {
        name: _annotated(spec._replace(flag=spec.flag or name), hints[name]) for name, spec in plain.items()
    }


def _annotated(spec: Spec, annotation: Any) -> Spec:  # noqa: ANN401  # annotations have no type of their own
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = next(one for one in arguments if one is not type(None))
        return _annotated(spec, inner)._replace(optional=True)
    if origin is tuple:
        return _annotated(spec, arguments[0])._replace(many=True)
    if origin is typing.Literal:
        return spec._replace(of=type(arguments[0]), choices=arguments)
    return spec._replace(of=annotation)


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
        if name in skip or not spec.has_flag:
            continue
        default, shown, keywords = spec.of_flag(), spec.help, dict[str, Any]()
        if spec.of is bool:
            keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            keywords |= {"type": _parser(spec), "choices": spec.choices}
            keywords["nargs"] = ("*" if spec.may_be_empty else "+") if spec.many else None
            if default not in (None, dataclasses.MISSING):
                shown += f" (default: {' '.join(map(str, default)) if spec.many else default})"
        keywords["default"] = argparse.SUPPRESS if given_only else default
        keywords["help"] = argparse.SUPPRESS if spec.rare and not show_rare else shown.replace("%", "%%")
        group.add_argument(f"--{spec.flag}", **keywords)


def path(text: str) -> str:
    """Expand ~ as a shell would; ValueError for an empty name. Argparse's `type` of a path."""
    if not text:
        raise ValueError("a path is empty: give one, or leave the flag out")
    return os.path.expanduser(text)


def _parser(spec: Spec) -> Callable[[str], object]:
    """Make argparse's `type` of an option; "auto" is None for a number that may be None."""

    def parse(text: str) -> object:
        if spec.path:
            return os.path.abspath(path(text))
        auto = text == "auto" and spec.optional and spec.of in (int, float)
        return None if auto else spec.of(text)

    parse.__name__ = spec.of.__name__  # what argparse says was expected
    return parse


def from_args(kind: type[OptionsT], args: argparse.Namespace, **given: object) -> OptionsT:
    """Build options from parsed flags, of which `given` takes the place; OptionError."""
    flags = {name: spec.flag for name, spec in specs(kind).items() if hasattr(args, spec.flag)}
    return kind(**{**{name: getattr(args, flag) for name, flag in flags.items()}, **given})
