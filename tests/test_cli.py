"""Scripts: what an exception says and returns, and what a path may be."""

import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from engine.cli import Parser, expand, run_script, say
from engine.options import OptionError, Options, option, path
from engine.processes import RunError, handled_by, stop


@dataclass(frozen=True)
class Example(Options):
    kind: str = option("x", "kind of thing", flag="the_kind")


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OptionError("kind", "z", "give x"), 2, "error: --the_kind is 'z': give x"),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "a.png"),
        (RunError("it failed"), 1, "error: it failed"),
        (MemoryError(), 1, "lower it"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower it"),
        (torch.AcceleratorError("CUDA error: no kernel image is available\nmore"), 1, "--device cpu"),
        (KeyboardInterrupt(), 130, "SIGINT; nothing"),
    ],
    ids=str,
)
def test_what_a_user_can_cause_is_one_line_and_a_status(error, status, said, capsys):
    assert run_script("x.py", raising(error), [Example], "lower it", "nothing") == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("x.py: ")
    assert printed.count("\n") == 1


def test_a_mistake_of_the_program_is_no_mistake_of_its_user():
    with pytest.raises(RuntimeError, match="shapes"):
        run_script("x.py", raising(RuntimeError("shapes cannot be multiplied")))


def test_a_signal_stops_the_work_and_a_signal_that_is_ignored_does_not(capsys):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    try:
        assert run_script("x.py", work) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_another_thread_works_without_signals():
    def work():
        with handled_by(stop):
            return 3

    with ThreadPoolExecutor() as other:
        assert other.submit(run_script, "x.py", work).result() == 3


def test_signs_that_an_encoding_lacks_are_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert run_script("x.py", lambda: say("├ 字") or 0) == 0
    assert written.getvalue() == rb"\u251c \u5b57" + os.linesep.encode()


def test_flags_that_a_parser_refuses_are_a_value_error():
    parser = Parser()
    parser.add_argument("--to", type=path)
    for wrong in (["--to", ""], ["--tot", "x"], ["--to"]):
        with pytest.raises(ValueError, match="to"):
            parser.parse_args(wrong)


def test_names_are_expanded_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b.png", "a.png", "[x].png"):
        (tmp_path / name).touch()
    assert path("~/a.png") == str(tmp_path / "a.png")
    assert expand(["~/[ab].png", "~/[x].png"]) == [str(tmp_path / n) for n in ("a.png", "b.png", "[x].png")]
    with pytest.raises(ValueError, match="jpg"):
        expand(["~/*.jpg"])
