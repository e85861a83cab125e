"""The layers of the house: imports only go down, and none of a script; functions are short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"imaging"},
    {"bicubic", "degradation", "engine"},
    {"util"},
    {"unet"},
    {"training", "samplers"},
    {"diffusion"},
    {"models"},
    {"restoration"},
    {"evaluation"},
    {"train_diffusion", "infer", "evaluate", "app", "examples", "bench"},
]
SCRIPTS = {"train_diffusion", "infer", "evaluate", "app"}
PLACES = set().union(*LAYERS)
FILES = sorted(
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    if path.relative_to(ROOT).parts[0] not in {"tests", ".venv"}
)


def place(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_places(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names & PLACES


def layer(name):
    return next(index for index, names in enumerate(LAYERS) if name in names)


def test_every_file_has_a_layer():
    assert {place(path) for path in FILES} == PLACES


def test_the_root_is_small():
    assert len({path for path in ROOT.glob("*.py") if path.stem not in SCRIPTS}) <= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    own = place(path)
    assert all(layer(name) <= layer(own) for name in imported_places(path))


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(script):
    assert not imported_places(ROOT / f"{script}.py") & (SCRIPTS - {script})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    assert not [each for each in lengths if each[1] > (60 if each[0] == "main" else 40)]
