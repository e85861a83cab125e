"""Tests of imaging/kinds.py: the images of a folder, by suffix and first bytes."""

import struct

import pytest
from PIL import Image

from imaging.kinds import list_images


def test_list_images_is_sorted_nested_and_blind_to_other_files(tmp_path):
    names = ["b.PNG", "a.jpeg", "sub/c.tif", "sub/deeper/d.WebP", "sub/e.jpe", "sub/f.jfif"]
    for name in [*names, "notes.txt", ".hidden.png", ".cache/e.png", "sub/._c.tif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path), recursive=False) == [tmp_path / "a.jpeg", tmp_path / "b.PNG"]


@pytest.mark.parametrize(
    ("folder", "recursive", "value"),
    [
        ("missing", True, "missing: no such folder"),
        ("empty", True, r"no image.*\.jpeg.*\.png"),
        ("photos", False, "subfolders were not searched"),
        ("photos/sub/file.png", True, "not a folder"),
        ("unreadable", True, r"1 \.heic"),
    ],
)
def test_a_folder_without_images_is_refused_with_what_was_passed_over(tmp_path, folder, recursive, value):
    for name in ("empty", "photos/sub", "unreadable"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("photos/sub/file.png", "unreadable/a.heic"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=value):
        list_images(tmp_path / folder, recursive)


def test_kinds_that_cannot_be_read_are_named_once_with_their_numbers(tmp_path, caplog):
    for name in ("a.png", "b.heic", "c.HEIC", "d.nef", "e.txt", "f.jxl"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list_images(tmp_path) == [tmp_path / "a.png"]
    (record,) = caplog.records
    assert all(said in record.getMessage() for said in ("2 .heic", "1 .nef", "1 .jxl", "1 .png"))
    assert "txt" not in record.getMessage()


def test_first_bytes_count_for_more_than_a_suffix(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "IMG_1.HEIC", "JPEG")
    Image.new("RGB", (8, 8)).save(tmp_path / "IMG_2.dng", "PNG")
    (tmp_path / "IMG_3.HEIC").write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic")
    assert list_images(tmp_path) == [tmp_path / "IMG_1.HEIC", tmp_path / "IMG_2.dng"]
    assert "1 .heic (HEIC" in caplog.text


def test_linked_folders_are_followed_once_and_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "b").mkdir(parents=True)
    for name in ("elsewhere/1.png", "photos/b/2.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos" / "a_linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a_twice").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    for folder in (tmp_path / "photos", tmp_path / "linked"):
        assert list_images(folder) == [folder / "a_linked" / "1.png", folder / "b" / "2.png"]
