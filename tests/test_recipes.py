"""Recipes: files of flags."""

import pytest

from engine.recipes import expand_recipes


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return f"@{path}"


def test_a_recipe_holds_flags_quotes_and_comments(tmp_path):
    recipe = write(tmp_path, "one.args", "# widths\n--dims 1 2 2  # three\n\n--folder 'my photos' --size 7\n")
    expected = ["--dims", "1", "2", "2", "--folder", "my photos", "--size", "7", "--size", "9"]
    assert expand_recipes([recipe, "--size", "9"]) == expected


def test_a_recipe_names_another_relative_to_itself(tmp_path, monkeypatch):
    write(tmp_path, "recipes/base.args", "--a 1")
    recipe = write(tmp_path, "recipes/more.args", "@base.args\n--b 2")
    monkeypatch.chdir("/")
    assert expand_recipes([recipe]) == ["--a", "1", "--b", "2"]


def test_a_byte_order_mark_is_no_part_of_a_flag(tmp_path):
    assert expand_recipes([write(tmp_path, "bom.args", "--a 1", "utf-8-sig")]) == ["--a", "1"]


def test_backslashes_are_kept(tmp_path):
    recipe = write(tmp_path, "windows.args", r"--image_folder C:\data\new")
    assert expand_recipes([recipe]) == ["--image_folder", r"C:\data\new"]


@pytest.mark.parametrize(
    ("text", "named"),
    [("--a 1\n--b 'open", "line 2"), ("@self.args", "self.args"), ("@gone.args", "gone.args")],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        expand_recipes([write(tmp_path, "self.args", text)])
