"""Options: flags, checks and records follow from the fields."""

import argparse
import math
import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from engine.cli import with_flag
from engine.options import OptionError, Options, add_flags, from_args, option


@dataclass(frozen=True)
class Example(Options):
    retired: ClassVar = {"sizes": []}

    count: int = option(3, "number of things", low=1)
    kind: Literal["x", "y"] = option("x", "kind of thing", flag="the_kind")
    widths: tuple[int, ...] = option((1, 2), "widths", low=1)
    share: float | None = option(None, "share, at most 5% of it", above=0, high=1)
    loud: bool = option(False, "more words")
    size: int = option(0, "size of things", script=8, rare=True)
    place: str = option("./here", "folder", path=True)
    inner: int = option(1, "number within", has_flag=False)


def parse(*flags, **how):
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, **how)
    return parser.parse_args(flags)


def test_flags_give_the_values_and_without_them_there_are_the_defaults_of_the_script(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = "--count 5 --the_kind y --widths 3 4 --share 0.5 --loud --size 9 --place ~/x".split()
    assert from_args(Example, parse(*flags)) == Example(5, "y", (3, 4), 0.5, True, 9, "/home/me/x")
    assert from_args(Example, parse()) == Example.of() == Example(size=8, place=os.path.abspath("here"))
    assert vars(parse("--count", "2", given_only=True)) == {"count": 2}
    assert parse("--share", "auto").share is None
    with pytest.raises(SystemExit):
        parse("--count", "auto")  # is never None


def test_help_names_flag_default_choices_and_text_and_keeps_what_is_rare_for_who_asks(capsys):
    for show_rare in (True, False):
        with pytest.raises(SystemExit):
            parse("--help", show_rare=show_rare)
        shown = " ".join(capsys.readouterr().out.split())
        known = ("--the_kind {x,y}", "number of things (default: 3)", "at most 5% of it")
        assert all(text in shown for text in known)
        assert ("size of things (default: 8)" in shown) == show_rare
        assert "inner" not in shown


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
    expected = {"count": 4, "kind": "x", "widths": [5, 6], "share": 0.25, "loud": False}
    assert example.to_dict() == {**expected, "size": 0, "place": "./here", "inner": 1}
    assert Example.from_dict(example.to_dict()) == example


def test_a_record_of_another_version_lacks_fields_or_has_retired_ones_and_an_unknown_field_is_refused():
    assert Example.from_dict({"count": 9}) == Example.from_dict({"count": 9, "sizes": []}) == Example(count=9)
    for unknown, named in (({"sizes": [2.0]}, r"sizes is \[2\.0\]"), ({"colour": "red"}, "colour")):
        with pytest.raises(ValueError, match=named):
            Example.from_dict(unknown)
