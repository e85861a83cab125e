"""Options: flags, checks and records follow from the fields."""

import argparse
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from engine.cli import with_flag
from engine.options import OptionError, Options, add_flags, from_args, option


@dataclass(frozen=True)
class Example(Options):
    retired: ClassVar = {"sizes": []}

    count: int = option(3, "how many", low=1)
    kind: Literal["x", "y"] = option("x", "which kind", flag="the_kind")
    widths: tuple[int, ...] = option((1, 2), "widths", low=1)
    share: float | None = option(None, "a share, at most 5% of it", above=0, high=1)
    loud: bool = option(False, "say more")


def parse(*flags, **defaults):
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, defaults=defaults)
    return from_args(Example, parser.parse_args(flags))


def test_flags_give_the_values():
    flags = ["--count", "5", "--the_kind", "y", "--widths", "3", "4", "--share", "0.5", "--loud"]
    assert parse(*flags) == Example(5, "y", (3, 4), 0.5, True)


def test_no_flags_give_the_defaults_of_the_fields_or_of_the_script():
    assert parse() == Example()
    assert parse(count=7) == Example(count=7)


def test_auto_is_the_default_of_a_number_that_may_be_none():
    assert parse("--share", "auto", share=0.5) == Example(share=None)
    with pytest.raises(SystemExit):
        parse("--count", "auto")


def test_help_names_flag_default_choices_and_text(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in ("--the_kind {x,y}", "how many (default: 3)", "at most 5% of it"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"count": 1.5},
        {"count": True},
        {"kind": "z"},
        {"widths": ()},
        {"widths": (1, 0)},
        {"share": 0},
        {"share": 1.1},
        {"share": math.nan},
        {"share": math.inf},
        {"loud": 1},
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_by_flag(wrong):
    with pytest.raises(OptionError) as found:
        Example(**wrong)
    name, value = next(iter(wrong.items()))
    assert str(found.value).startswith(f"{name} is {value!r}")
    flag = {"kind": "the_kind"}.get(name, name)
    assert with_flag(found.value, [Example]).startswith(f"--{flag} is {value!r}")


def test_a_record_is_plain_and_comes_back():
    example = Example(count=4, widths=(5, 6), share=0.25)
    assert example.to_dict() == {"count": 4, "kind": "x", "widths": [5, 6], "share": 0.25, "loud": False}
    assert Example.from_dict(example.to_dict()) == example


def test_a_record_without_a_field_has_its_default_and_an_unknown_field_is_refused():
    assert Example.from_dict({"count": 9}) == Example(count=9)
    with pytest.raises(ValueError, match="colour"):
        Example.from_dict({"colour": "red"})


def test_a_retired_field_is_left_out_if_it_has_the_one_value_that_can_be_followed():
    assert Example.from_dict({"count": 9, "sizes": []}) == Example(count=9)
    with pytest.raises(OptionError, match=r"sizes is \[2\.0, 4\.0\]"):
        Example.from_dict({"sizes": [2.0, 4.0]})
