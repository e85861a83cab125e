"""Does what every script does around its work: flags, recipes, paths, lines, and exceptions in words."""

import argparse
import contextlib
import glob
import io
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch

from engine.device import is_out_of_memory
from engine.options import OptionError, Options, one_line, path, specs
from engine.processes import Processes, RunError, Stopped, handled_by, started_processes, stop

logger = logging.getLogger(__name__)

# A comment begins a line or follows a space; within a word or quotes # is a letter.
_COMMENT = re.compile(r"""('[^']*'|"[^"]*")|(?<!\S)#.*""")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors: one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def module_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of what is started as `python -m NAME`; it shows a description with its line breaks."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {name}", description=description, formatter_class=kind)


def in_processes(
    parser: Parser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace, Processes], int]
) -> int:
    """Return the status of work() with the flags, in each of the processes, which wait for days."""
    args = parser.parse_args(argv)
    with started_processes(args.device, timedelta(days=7)) as processes:
        return work(args, processes)


def expand(names: Sequence[str]) -> list[str]:
    """Expand ~, and * ? [ ] where no file has that name, as a shell would; ValueError for no match."""
    expanded: list[str] = []
    for name in map(path, names):
        matches = [name] if os.path.lexists(name) or not glob.has_magic(name) else sorted(glob.glob(name))
        if not matches:
            raise ValueError(f"{name}: no file has such a name")
        expanded += matches
    return expanded


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


def say(*lines: str) -> None:
    """Print lines; where stdout takes no more, as with `| head`, the work goes on without it."""
    try:
        for line in lines:
            print(line, flush=True)  # noqa: T201
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            logger.warning("stdout cannot be written (%s); going on without it", error.strerror)
        # What is still buffered must not fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process


def warn(script: str, text: str) -> None:
    """Print a line of a script to stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(f"{script}: {text}", file=sys.stderr, flush=True)  # noqa: T201


def run_script(
    script: str,
    work: Callable[[], int],
    options: Sequence[type[Options]] = (),
    out_of_memory: str = "take a smaller image or another device",
    stopped: str = "nothing was written",
) -> int:
    """Return the status of work(), or of its exception, which becomes one line on stderr.

    2 for wrong flags and files (ValueError, OSError), 1 for a RunError and for no more memory, 128 + n for
    signal n; other exceptions are mistakes of the program, and pass. `options` translate the field of an
    OptionError to its flag; `out_of_memory` is a remedy, `stopped` the state of the work after a signal.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names and signs that it has no letters for
    try:
        with handled_by(stop):
            return work()
    except (ValueError, OSError) as error:
        status, message = 2, with_flag(error, options) if isinstance(error, OptionError) else one_line(error)
    except RunError as error:
        status, message = 1, one_line(error)
    except torch.AcceleratorError as error:
        status, message = 1, f"{str(error).splitlines()[0]}; --device cpu works without it"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        status, message = 1, f"out of memory: {out_of_memory}"
    except (KeyboardInterrupt, Stopped) as error:
        number = signal.Signals(error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
        status, message = 128 + number, f"stopped by {number.name}; {stopped}"
    warn(script, message if status > 128 else f"error: {message}")
    return status


def with_flag(error: OptionError, options: Sequence[type[Options]]) -> str:
    """Write the message of an OptionError, with the flag instead of the field."""
    flags = {name: spec.flag for kind in options for name, spec in specs(kind).items()}
    flag = flags.get(error.field, error.field)
    return f"--{flag} is {error.value!r}: {error.rule}"
