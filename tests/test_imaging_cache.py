"""Tests of imaging/cache.py: the same pixels, decoded once, within the limit."""

import errno
import multiprocessing
import os
import sys
import tempfile
import time

import numpy as np
import pytest

from imaging import cache
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


def test_a_full_disk_keeps_every_image_and_warns_once(photo_folder, counted, monkeypatch, caplog):
    read, calls = counted
    paths = sorted(photo_folder.iterdir())

    def fail(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = CachedReader(10**6, read)
    reader(paths[0])
    monkeypatch.setattr(cache, "write_atomically", fail)
    for path in paths * 2:
        assert np.array_equal(reader(path), read_rgb(path))
    assert len(calls) == 1 + 2 * (len(paths) - 1)  # what was kept before still is
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text


def test_a_temporary_folder_that_cannot_be_written_is_a_warning(photo_folder, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/none")
    path = sorted(photo_folder.iterdir())[0]
    assert np.array_equal(CachedReader(10**6)(path), read_rgb(path))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_cache_of_nothing_makes_no_folder(monkeypatch, tmp_path, photo_folder):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    CachedReader(0)(sorted(photo_folder.iterdir())[0])
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_a_cleaner_removed_is_decoded_again(photo_folder, counted, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read, calls = counted
    reader, path = CachedReader(10**6, read), sorted(photo_folder.iterdir())[0]
    reader(path)
    (array,) = tmp_path.glob("*/*.npy")
    array.unlink()
    assert np.array_equal(reader(path), read_rgb(path))
    assert len(calls) == 2


def test_the_folder_goes_with_the_reader_but_not_with_a_forked_worker(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reader = CachedReader(10**6)
    worker = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0))
    worker.start()
    worker.join()
    assert len(list(tmp_path.iterdir())) == 1
    del reader
    assert list(tmp_path.iterdir()) == []


def read_for_ever(started):
    reader = CachedReader(9)
    started.set()
    time.sleep(600)
    del reader


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_uses_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("fork")
    runs = []
    for _ in range(2):
        started = context.Event()
        runs.append(context.Process(target=read_for_ever, args=(started,)))
        runs[-1].start()
        assert started.wait(60)
    runs[1].kill()
    runs[1].join()
    assert len(list(tmp_path.iterdir())) == 2
    reader = CachedReader(9)
    assert len(list(tmp_path.iterdir())) == 2  # the live run's and its own
    runs[0].kill()
    runs[0].join()
    another = CachedReader(9)
    assert len(list(tmp_path.iterdir())) == 2
    del reader, another
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_utf_8_are_cached(tmp_path, counted):
    read, calls = counted
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    write_image(path, np.zeros((8, 8, 3), np.uint8))
    reader = CachedReader(10**6, read)
    for _ in range(2):
        assert reader(path).shape == (8, 8, 3)
    assert len(calls) == 1
