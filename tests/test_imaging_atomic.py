"""Tests of imaging/atomic.py: the old content or the whole of the new, on every kind of path and disk."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from imaging import atomic
from imaging.atomic import check_outputs, is_disk_error, write_atomically, write_text_atomically


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_a_new_file_is_written_with_its_folders_and_follows_the_umask(tmp_path, mask):
    path, previous = tmp_path / "a" / "b" / "file.bin", os.umask(mask)
    try:
        write_text_atomically(path, "né")
    finally:
        os.umask(previous)
    assert path.read_bytes() == "né".encode()
    assert permissions(path) == 0o666 & ~mask
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def refuse(number, *_):
    raise OSError(number, os.strerror(number))


def fail(stream):
    stream.write(b"half")
    raise KeyError("no more")


def fill_the_disk(stream):
    stream.write = lambda data: refuse(errno.ENOSPC)
    torch.save({"weight": torch.zeros(10_000)}, stream)  # which raises RuntimeError


@pytest.mark.parametrize(
    ("write", "fsync", "error"),
    [
        (fail, None, KeyError),
        (fill_the_disk, None, OSError),
        *((lambda stream: None, one, OSError) for one in (errno.EDQUOT, errno.EROFS, errno.EIO)),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, fsync, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    if fsync:
        monkeypatch.setattr(os, "fsync", lambda _: refuse(fsync))
    with pytest.raises(error) as raised:
        write_atomically(path, write)
    assert is_disk_error(raised.value) == (error is OSError)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file.bin", "old")]


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOTSUP])
def test_the_old_content_is_there_until_the_new_is_on_the_disk_or_the_disk_cannot_say(
    tmp_path, monkeypatch, number
):
    path, seen = tmp_path / "file", []
    path.write_text("old")

    def fsync(_):
        seen.append(path.read_text())
        if number:
            refuse(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text_atomically(path, "new")
    assert seen == ["old"]
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "new")]


def test_a_link_stays_and_its_target_is_replaced_with_its_permissions(tmp_path):
    (tmp_path / "a").mkdir()
    target, link, dangling = tmp_path / "a" / "file", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    target.chmod(0o664)
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "a" / "new")
    for path in (link, dangling):
        write_text_atomically(path, "new")
        assert path.is_symlink()
        assert path.read_text() == "new"
    assert permissions(target) == 0o664
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a", "dangling", "file", "link", "new"]


def test_a_pipe_and_a_device_are_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_text_atomically(pipe, "new")
    reader.join(10)
    assert read == [b"new"]
    assert pipe.is_fifo()
    write_text_atomically(Path(os.devnull), "new")
    assert Path(os.devnull).is_char_device()


def test_an_open_descriptor_is_written_to_where_it_stands(tmp_path):
    with (tmp_path / "log").open("w+b", buffering=0) as stream:
        stream.write(b"before, ")
        path = Path(f"/dev/fd/{stream.fileno()}")
        check_outputs([path])
        write_text_atomically(path, "within")
        stream.write(b", after")
    assert (tmp_path / "log").read_bytes() == b"before, within, after"


@pytest.fixture
def folder(tmp_path):
    for name in ("input.png", "old.json"):
        (tmp_path / name).touch()
    (tmp_path / "linked.png").symlink_to(tmp_path / "input.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "input.png")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("names", "value"),
    [
        *(([name], f"{name}: is an input") for name in ("input.png", "linked.png", "hard.png")),
        (["folder"], "folder: is a folder"),
        (["new", "folder/../new"], "two outputs"),
        (["input.png/new"], "because of .*input.png"),
    ],
)
def test_an_output_that_cannot_or_must_not_be_written_is_refused_before_the_work(folder, names, value):
    with pytest.raises(ValueError, match=value):
        check_outputs([folder / name for name in names], inputs=[folder / "input.png"], overwrite=True)


def test_what_exists_is_replaced_only_where_that_is_allowed(folder):
    outputs = [folder / "old.json", folder / "new" / "a.png", Path(os.devnull), Path(os.devnull)]
    with pytest.raises(ValueError, match=r"old.json: exists already; .*--overwrite"):
        check_outputs(outputs)
    check_outputs(outputs, overwrite=True)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("refused", "value"), [("old.json", "permissions"), (".", "because of")])
def test_a_file_or_folder_without_permission_to_write_is_named(folder, monkeypatch, refused, value):
    named = os.fspath(folder / refused)
    monkeypatch.setattr(atomic.os, "access", lambda path, mode: os.fspath(path) != named)
    with pytest.raises(ValueError, match=f"old.json: .*{value}"):
        check_outputs([folder / "old.json"], overwrite=True)
