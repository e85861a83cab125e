"""--help of everything that can be run: it starts nothing, and shows the command lines as they stand."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNNABLE = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")])
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_help_starts_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__")
    assert not end.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert not list(tmp_path.iterdir())
    if "." in name:
        documented = importlib.import_module(name).__doc__.splitlines()
        assert [line for line in documented if line.startswith("python ") and line not in printed] == []
