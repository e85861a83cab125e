"""What is installed: pyproject.toml names every module and dependency, and pages link to what exists."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from engine import VERSION

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image"}
OPTIONAL = {"gradio", "wordllama"}


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


def third_party(path):
    """The distributions that a file imports, wherever in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    ours = {each.stem for each in ROOT.iterdir()}
    return {
        DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
        for name in imported - ours - sys.stdlib_module_names
    }


def test_every_module_is_installed():
    assert set(SETUPTOOLS["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "bench"}
    assert set(SETUPTOOLS["packages"]) == packages | {"recipes", "weights"}


def test_the_released_models_and_recipes_are_package_data():
    for package, patterns in SETUPTOOLS["package-data"].items():
        assert all(list((ROOT / package).glob(pattern)) for pattern in patterns)


def test_requirements_are_the_dependencies():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(lines) == sorted(PROJECT["dependencies"])


def imports_of(folders):
    paths = (path for folder in folders for path in folder.glob("*.py"))
    return set().union(*map(third_party, paths)) - {"tests", *OPTIONAL}


PACKAGE = [ROOT, *(ROOT / name for name in SETUPTOOLS["packages"])]


@pytest.mark.parametrize(
    ("folders", "extras"), [(PACKAGE, []), ([ROOT / "tests"], ["dev"]), ([ROOT / "bench"], ["bench"])]
)
def test_what_is_imported_is_required(folders, extras):
    required = names(PROJECT["dependencies"])
    for extra in extras:
        required |= names(PROJECT["optional-dependencies"][extra])
    assert not imports_of(folders) - required


@pytest.mark.slow
def test_what_is_required_is_imported():
    through_others = {"tensorboard", "torchvision"}  # torch's log, and LPIPS of torchmetrics
    assert not names(PROJECT["dependencies"]) - imports_of(PACKAGE) - through_others


def test_the_version_is_said_once_and_its_changes_are_written_down():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "engine.VERSION"}
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
