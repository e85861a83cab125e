"""Tests of cache.py: the same pixels, decoded once, within the limit."""

import os

import numpy as np
import pytest

from imaging.cache import CachedReader
from imaging.files import UnreadableImageError, read_rgb, write_image


@pytest.fixture
def counted():
    calls = []

    def read(path):
        calls.append(path)
        return read_rgb(path)

    return read, calls


def test_a_file_is_decoded_once(photo_folder, counted):
    read, calls = counted
    reader = CachedReader(10**6, read)
    path = sorted(photo_folder.iterdir())[0]
    assert np.array_equal(reader(path), read_rgb(path))
    again = reader(path)
    assert np.array_equal(again, read_rgb(path))
    assert isinstance(again, np.memmap)
    assert len(calls) == 1


def test_the_limit_holds(photo_folder, counted):
    read, calls = counted
    paths = sorted(photo_folder.iterdir())[:3]
    reader = CachedReader(2 * 48 * 56 * 3, read)
    for path in paths * 2:
        reader(path)
    assert [path.name for path in calls] == ["0.png", "1.png", "2.png", "2.png"]


def test_a_changed_file_is_decoded_again(tmp_path, counted):
    read, calls = counted
    reader, path = CachedReader(10**6, read), tmp_path / "image.png"
    write_image(path, np.zeros((8, 8, 3), np.uint8))
    reader(path)
    write_image(path, np.full((8, 8, 3), 200, np.uint8))
    os.utime(path, ns=(1, 1))
    assert int(reader(path)[0, 0, 0]) == 200
    assert len(calls) == 2


def test_a_missing_or_broken_file_is_an_error(tmp_path):
    reader = CachedReader(10**6)
    with pytest.raises(OSError, match="gone"):
        reader(tmp_path / "gone.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError):
        reader(tmp_path / "broken.png")


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="-1"):
        CachedReader(-1)
