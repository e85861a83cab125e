"""Tests of imaging/cache.py: the same pixels, read once by all runs, within the limit."""

import os

import numpy as np
import pytest

from imaging import cache
from imaging.cache import CachedReader, default_cache_dir
from imaging.files import read_rgb, write_image


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were decoded."""
    names = []
    monkeypatch.setattr(cache, "read_rgb", lambda path: (names.append(path.name), read_rgb(path))[1])
    return names


@pytest.fixture
def paths(photo_folder):
    return sorted(photo_folder.iterdir())


def test_a_file_is_decoded_once_for_all_runs(paths, reads, tmp_path):
    for reader in (CachedReader(tmp_path, 10**6), CachedReader(tmp_path, 10**6)):
        assert np.array_equal(reader(paths[0]), read_rgb(paths[0]))
    assert isinstance(reader(paths[0]), np.memmap)
    assert reads == ["0.png"]


@pytest.mark.parametrize("change", ["content", "removed", "cut short"])
def test_what_does_not_fit_the_file_any_more_is_decoded_again(tmp_path, reads, change):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")  # a name need not be UTF-8
    write_image(path, np.zeros((8, 8, 3), np.uint8))
    reader = CachedReader(tmp_path / "cache", 10**6)
    reader(path)
    (array,) = (tmp_path / "cache" / "images").iterdir()
    if change == "content":
        write_image(path, np.full((8, 8, 3), 200, np.uint8))
        os.utime(path, ns=(1, 1))
    elif change == "removed":
        array.unlink()
    else:
        array.write_bytes(array.read_bytes()[:-50])
    assert np.array_equal(reader(path), read_rgb(path))
    assert len(reads) == 2


@pytest.mark.parametrize("reason", ["full", "Not a directory"])
def test_what_cannot_be_kept_is_decoded_each_time_and_said_once(paths, reads, tmp_path, caplog, reason):
    (tmp_path / "file").touch()
    limit = 2 * (48 * 56 * 3 + 128)  # two of the images, each with its header
    reader = CachedReader(tmp_path / ("cache" if reason == "full" else "file"), limit)
    for path in paths[:4] * 2:
        assert np.array_equal(reader(path), read_rgb(path))
    assert reads == [path.name for path in (paths[:4] + paths[2:4] if reason == "full" else paths[:4] * 2)]
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_without_a_folder_or_room_nothing_is_made(paths, tmp_path):
    for reader in (CachedReader(tmp_path, 0), CachedReader(None, 10**6)):
        reader(paths[0])
    assert not list(tmp_path.iterdir())


def test_the_cache_is_in_the_user_s_cache_or_nowhere(monkeypatch, tmp_path, caplog):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "residual-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", unknown)
    assert default_cache_dir() is None
    assert "home directory" in caplog.text
