"""Recipes: files of flags."""

import pytest

from engine.cli import expand_recipes


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return f"@{path}"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("# widths, don't\n--dims 1 2  # two\n\n--to 'my photos'", ["--dims", "1", "2", "--to", "my photos"]),
        ("--to data/set#2 '# no' # yes", ["--to", "data/set#2", "# no"]),
        (r"--to C:\data\new", ["--to", r"C:\data\new"]),
        ("--to $PLACE/x '${PLACE}'", ["--to", "/there/x", "/there"]),
        ("\ufeff--size 1", ["--size", "1"]),  # a byte-order mark
    ],
)
def test_a_recipe_is_read_as_a_shell_would(text, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/there")
    assert expand_recipes([write(tmp_path, "one.args", text), "--size", "9"]) == [*flags, "--size", "9"]


def test_a_recipe_names_another_relative_to_itself(tmp_path, monkeypatch):
    write(tmp_path, "recipes/base.args", "--a 1")
    recipe = write(tmp_path, "recipes/more.args", "@base.args\n--b 2")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_recipes([recipe]) == expand_recipes(["@~/recipes/more.args"]) == ["--a", "1", "--b", "2"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--a 1\n--b 'open", "--b"),
        ("@self.args", "self.args"),
        ("@gone.args", "gone.args"),
        ("$NO_SUCH/x", "NO_SUCH"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        expand_recipes([write(tmp_path, "self.args", text)])
