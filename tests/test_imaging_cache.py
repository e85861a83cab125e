"""Tests of imaging/cache.py: the same pixels, read once by all runs, within the limit."""

import errno
import os
import shutil

import numpy as np
import pytest

from imaging import cache
from imaging.cache import CachedReader, default_cache_dir
from imaging.files import UnreadableImageError, read_rgb, write_image

BYTES = 48 * 56 * 3  # of each image of photo_folder


@pytest.fixture
def reads():
    """The names of the files that were read."""
    return []


@pytest.fixture
def opened(tmp_path, reads):
    """A function that opens the cache as a run does."""

    def read(path):
        reads.append(path.name)
        return read_rgb(path)

    return lambda limit=10**6: CachedReader(tmp_path / "cache", limit, read)


@pytest.fixture
def paths(photo_folder, tmp_path):
    return sorted(shutil.copytree(photo_folder, tmp_path / "photos").iterdir())


def test_a_file_is_decoded_once_for_all_runs(opened, paths, reads):
    for reader in (opened(), opened()):
        assert np.array_equal(reader(paths[0]), read_rgb(paths[0]))
    assert isinstance(reader(paths[0]), np.memmap)
    assert reads == ["0.png"]


@pytest.mark.parametrize("change", ["content", "removed", "cut short"])
def test_what_does_not_fit_the_file_any_more_is_decoded_again(opened, tmp_path, reads, change):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")  # a name need not be UTF-8
    write_image(path, np.zeros((8, 8, 3), np.uint8))
    reader = opened()
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


def test_the_limit_holds_and_what_no_run_uses_makes_room(opened, paths, reads, tmp_path):
    limit = 2 * (BYTES + 200)  # 128 bytes of header each
    reader = opened(limit)
    for path in paths[:3] * 2:
        reader(path)
    assert reads == ["0.png", "1.png", "2.png", "2.png"]
    images = tmp_path / "cache" / "images"
    (images / ".half.tmp").write_bytes(b"of a run that was killed")
    for old in images.iterdir():
        os.utime(old, (1, 1))
    reads.clear()
    later = opened(limit)
    for path in [paths[0], *paths[2:4]] * 2:
        later(path)
    assert reads == ["2.png", "3.png", "3.png"]
    assert len(list(images.iterdir())) == 2


def test_a_missing_or_broken_file_is_an_error(opened, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for name, error in {"gone.png": OSError, "broken.png": UnreadableImageError}.items():
        with pytest.raises(error, match=name):
            opened()(tmp_path / name)


def test_a_negative_limit_is_refused_and_none_makes_no_folder(opened, paths, tmp_path):
    with pytest.raises(ValueError, match="-1"):
        opened(-1)
    for reader in (opened(0), CachedReader(None, 10**6)):
        reader(paths[0])
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_keeps_every_image_and_warns_once(opened, paths, reads, monkeypatch, caplog):
    def fail(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = opened()
    reader(paths[0])
    monkeypatch.setattr(cache, "write_atomically", fail)
    for path in paths * 2:
        assert np.array_equal(reader(path), read_rgb(path))
    assert len(reads) == 1 + 2 * (len(paths) - 1)  # what was kept before still is
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.count("No space left") == 1


def test_a_folder_that_cannot_be_written_is_a_warning(paths, tmp_path, caplog):
    (tmp_path / "file").touch()
    reader = CachedReader(tmp_path / "file" / "cache", 10**6)
    for path in paths:
        assert np.array_equal(reader(path), read_rgb(path))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_cache_is_in_the_user_s_cache_or_nowhere(monkeypatch, tmp_path, caplog):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "residual-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", unknown)
    assert default_cache_dir() is None
    assert "home directory" in caplog.text
