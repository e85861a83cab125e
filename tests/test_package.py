"""What is installed: pyproject.toml names every module and dependency, and pages link to what exists."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from engine import VERSION
from tests.test_layers import imported

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["optional-dependencies"]
# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image"}
PACKAGE = [ROOT, *(ROOT / name for name in SETUPTOOLS["packages"])]


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


def imports_of(folders):
    """The distributions that files import, wherever in them."""
    names = set().union(*(imported(path) for folder in folders for path in folder.glob("*.py")))
    others = names - {each.stem for each in ROOT.iterdir()} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in others}


def test_every_module_is_installed():
    assert set(SETUPTOOLS["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert set(SETUPTOOLS["packages"]) == packages | {"recipes", "weights"}
    for package, patterns in SETUPTOOLS["package-data"].items():
        assert all(list((ROOT / package).glob(pattern)) for pattern in patterns)


def test_requirements_are_the_dependencies():
    assert sorted((ROOT / "requirements.txt").read_text().split()) == sorted(PROJECT["dependencies"])


@pytest.mark.parametrize(
    ("folders", "extras"), [(PACKAGE, ["app"]), ([ROOT / "tests"], ["dev"]), ([ROOT / "bench"], ["bench"])]
)
def test_what_is_imported_is_required_and_held_for_ci(folders, extras):
    required = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in extras))
    assert imports_of(folders) <= required
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert required <= names(lines)


@pytest.mark.slow
def test_what_is_required_is_imported():
    through_others = {"tensorboard", "torchinfo", "torchvision"}  # torch's log, import_optional, torchmetrics
    assert names(PROJECT["dependencies"]) <= imports_of(PACKAGE) | through_others


def test_the_version_is_said_once_and_its_changes_are_written_down():
    assert "version" in PROJECT["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "engine.VERSION"}
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
