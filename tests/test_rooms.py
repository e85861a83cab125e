"""The order of the modules: imports only go down the list, and nothing imports a script."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "files",
    "images",
    "scan",
    "cache",
    "bicubic",
    "metrics",
    "dead_leaves",
    "device",
    "processes",
    "util",
    "unet",
    "checkpoint",
    "training",
    "schedules",
    "samplers",
    "tiling",
    "diffusion",
    "restoration",
    "meter",
    "report",
    "evaluation",
]
SCRIPTS = ["train_diffusion", "infer", "evaluate", "demo"]


def imported_rooms(path):
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & {*ORDER, *SCRIPTS}


def test_every_module_is_in_the_list():
    assert {path.stem for path in ROOT.glob("*.py")} == {*ORDER, *SCRIPTS}


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_go_down(name):
    above = {*ORDER[ORDER.index(name) :], *SCRIPTS}
    assert not imported_rooms(ROOT / f"{name}.py") & above


@pytest.mark.parametrize("name", ["demo"])
def test_the_demo_alone_may_run_other_scripts(name):
    assert imported_rooms(ROOT / f"{name}.py") & {*SCRIPTS}


@pytest.mark.parametrize("name", ["train_diffusion", "infer", "evaluate"])
def test_scripts_do_not_import_each_other(name):
    assert not imported_rooms(ROOT / f"{name}.py") & {*SCRIPTS}
