"""Tests of files.py: the old content or the whole of the new, and nothing beside it."""

import os
import stat

import pytest

from imaging.atomic import write_atomically


def test_a_new_file_is_written_with_its_folders_and_ordinary_permissions(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    mask = os.umask(0)
    os.umask(mask)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    seen = []

    def write(temporary):
        temporary.write_bytes(b"new")
        seen.append(path.read_bytes())

    write_atomically(path, write)
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
