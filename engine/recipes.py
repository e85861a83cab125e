"""Recipes: files of flags, named on a command line as @file."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.options import path

# A comment begins a line or follows a space; within a word or quotes # is a letter.
_COMMENT = re.compile(r"""('[^']*'|"[^"]*")|(?<!\S)#.*""")


def expand_recipes(arguments: Sequence[str], folder: Path = Path(), outer: Sequence[Path] = ()) -> list[str]:
    """Replace every @file, relative to `folder`, by the flags in it; ValueError names what cannot be read."""
    flags: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            flags.append(argument)
            continue
        recipe = folder / path(argument[1:])
        if recipe.resolve() in outer:
            raise ValueError(f"the recipe {recipe} includes itself: remove one of its @ lines")
        flags += expand_recipes(_words(recipe), recipe.parent, [*outer, recipe.resolve()])
    return flags


def _words(recipe: Path) -> list[str]:
    try:
        text = recipe.read_text(encoding="utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {recipe} cannot be read: {error}") from error
    lexer = shlex.shlex(_COMMENT.sub(lambda match: match[1] or "", text), posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""  # C:\data keeps its backslash
    words: list[str] = []
    try:
        words.extend(os.path.expandvars(word) for word in lexer)
    except ValueError as error:
        raise ValueError(f"the recipe {recipe}: a quote does not end, after {words[-1:]}") from error
    if unknown := [word for word in words if "$" in word]:
        raise ValueError(f"the recipe {recipe}: there is no such variable: {unknown[0]}")
    return words
