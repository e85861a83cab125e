"""Tests of scan.py: right sizes, read once, never a stale one."""

import os

import numpy as np
import pytest

from imaging import sizes as scan
from imaging.files import UnreadableImageError, image_size, write_image
from imaging.sizes import default_memory, image_sizes


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

    monkeypatch.setattr(scan, "image_size", counting)
    return calls


def test_sizes_are_those_of_the_headers(folder):
    paths = sorted(folder.iterdir())
    assert image_sizes(paths) == [(8 + number, 20) for number in range(5)]


def test_a_second_scan_reads_nothing(folder, tmp_path, reads):
    paths = sorted(folder.iterdir())
    first = image_sizes(paths, tmp_path / "memory")
    assert sorted(reads) == [path.name for path in paths]
    reads.clear()
    assert image_sizes(paths, tmp_path / "memory") == first
    assert reads == []


def test_a_changed_or_new_file_is_read_again(folder, tmp_path, reads):
    paths = sorted(folder.iterdir())
    image_sizes(paths[:4], tmp_path / "memory")
    reads.clear()
    write_image(paths[1], np.zeros((30, 40, 3), np.uint8))
    os.utime(paths[1], ns=(1, 1))
    assert image_sizes(paths, tmp_path / "memory")[1] == (30, 40)
    assert sorted(reads) == ["1.png", "4.png"]


def test_a_file_that_cannot_be_read_says_so_and_is_tried_again(folder, tmp_path, reads):
    broken = folder / "broken.png"
    broken.write_bytes(b"nothing")
    paths = sorted(folder.iterdir())
    for _ in range(2):
        sizes = image_sizes([*paths, folder / "gone.png"], tmp_path / "memory")
        assert isinstance(sizes[paths.index(broken)], UnreadableImageError)
        assert isinstance(sizes[-1], UnreadableImageError)
    assert reads.count("broken.png") == reads.count("gone.png") == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"x": 1}'])
def test_a_damaged_memory_is_only_slower(folder, tmp_path, content):
    paths = sorted(folder.iterdir())
    first = image_sizes(paths, tmp_path / "memory")
    (index,) = (tmp_path / "memory").iterdir()
    index.write_bytes(content)
    assert image_sizes(paths, tmp_path / "memory") == first


def test_no_files_have_no_sizes(tmp_path):
    assert image_sizes([], tmp_path / "memory") == []


def test_the_memory_is_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_memory() == tmp_path / "residual-diffusion"
