"""Tests of imaging/sizes.py: right sizes, read once, never a stale one."""

import errno
import os

import numpy as np
import pytest

from imaging import sizes
from imaging.files import UnreadableImageError, image_size, write_image
from imaging.sizes import default_cache_dir, image_sizes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        write_image(tmp_path / "images" / f"{number}.png", np.zeros((8 + number, 20, 3), np.uint8))
    return tmp_path / "images"


@pytest.fixture
def reads(monkeypatch):
    calls = []

    def counting(path):
        calls.append(path.name)
        return image_size(path)

    monkeypatch.setattr(sizes, "image_size", counting)
    return calls


def test_sizes_are_those_of_the_headers(folder):
    paths = sorted(folder.iterdir())
    assert image_sizes(paths) == [(8 + number, 20) for number in range(5)]


def test_a_second_scan_reads_nothing(folder, tmp_path, reads):
    paths = sorted(folder.iterdir())
    first = image_sizes(paths, tmp_path / "cache")
    assert sorted(reads) == [path.name for path in paths]
    reads.clear()
    assert image_sizes(paths, tmp_path / "cache") == first
    assert reads == []


def test_a_changed_or_new_file_is_read_again(folder, tmp_path, reads):
    paths = sorted(folder.iterdir())
    image_sizes(paths[:4], tmp_path / "cache")
    reads.clear()
    write_image(paths[1], np.zeros((30, 40, 3), np.uint8))
    os.utime(paths[1], ns=(1, 1))
    assert image_sizes(paths, tmp_path / "cache")[1] == (30, 40)
    assert sorted(reads) == ["1.png", "4.png"]


def test_a_file_that_cannot_be_read_says_so_and_is_tried_again(folder, tmp_path, reads):
    broken = folder / "broken.png"
    broken.write_bytes(b"nothing")
    paths = sorted(folder.iterdir())
    for _ in range(2):
        found = image_sizes([*paths, folder / "gone.png"], tmp_path / "cache")
        assert isinstance(found[paths.index(broken)], UnreadableImageError)
        assert isinstance(found[-1], UnreadableImageError)
    assert reads.count("broken.png") == reads.count("gone.png") == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"x": 1}'])
def test_a_damaged_index_is_only_slower(folder, tmp_path, content):
    paths = sorted(folder.iterdir())
    first = image_sizes(paths, tmp_path / "cache")
    (index,) = (tmp_path / "cache").iterdir()
    index.write_bytes(content)
    assert image_sizes(paths, tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_a_warning(folder, tmp_path, caplog):
    paths = sorted(folder.iterdir())
    (tmp_path / "file").touch()
    assert image_sizes(paths, tmp_path / "file" / "cache") == image_sizes(paths)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_full_disk_under_the_cache_is_a_warning(folder, tmp_path, caplog, monkeypatch):
    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    paths = sorted(folder.iterdir())
    assert image_sizes(paths, tmp_path / "cache") == image_sizes(paths)
    assert "No space left" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch, caplog):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sizes.Path, "home", unknown)
    assert default_cache_dir() is None
    assert "home directory" in caplog.text


def test_names_that_are_not_utf_8_are_remembered(tmp_path, reads):
    folder = tmp_path / os.fsdecode(b"ordn\xfcng")
    folder.mkdir()
    path = folder / os.fsdecode(b"caf\xe9.png")
    write_image(path, np.zeros((8, 9, 3), np.uint8))
    for _ in range(2):
        assert image_sizes([path], tmp_path / "cache") == [(8, 9)]
    assert len(reads) == 1


def test_no_files_have_no_sizes(tmp_path):
    assert image_sizes([], tmp_path / "cache") == []


def test_the_cache_is_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "residual-diffusion"
