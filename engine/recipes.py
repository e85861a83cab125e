"""Recipes: files of flags, named on a command line as @file."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def expand_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace every @file by its flags: quotes, # comments, @files relative to it; or ValueError."""
    return [
        flag
        for argument in arguments
        for flag in (_flags(Path(argument[1:]), ()) if argument.startswith("@") else [argument])
    ]


def _flags(path: Path, outer: tuple[Path, ...]) -> list[str]:
    if path.resolve() in outer:
        raise ValueError(f"the recipe {path} includes itself: remove one of its @ lines")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} cannot be read: {error}") from error
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        for flag in _split(line, f"{path}, line {number}"):
            if flag.startswith("@"):
                found += _flags(path.parent / flag[1:], (*outer, path.resolve()))
            else:
                found.append(flag)
    return found


def _split(line: str, place: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape = True, ""  # C:\data keeps its backslash
    try:
        return list(lexer)
    except ValueError as error:
        raise ValueError(f"{place}: a quote does not end: {line.strip()}") from error
