"""Tests of vllm_longmamba/checkpoint/trusted_file.py: whose files are read without being named."""

import os
from pathlib import Path

import pytest

from vllm_longmamba.checkpoint.trusted_file import UntrustedFileError, check_trusted, make_private_folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that only this user can write, in a folder that others may enter."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.parent.chmod(0o755)
    path.write_text("content")
    path.chmod(0o644)
    return path


def test_own_file(file: Path) -> None:
    check_trusted(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_trusted(tmp_path / "gone")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_file_that_others_may_write(mode: int, file: Path) -> None:
    file.chmod(mode)
    with pytest.raises(UntrustedFileError, match=rf"file may be written by others \(mode {mode:04o}\); `chmod go-w "):
        check_trusted(file)
    # Nobody else gets there.
    file.parent.chmod(0o700)
    check_trusted(file)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_folder_that_others_may_write(mode: int, file: Path) -> None:
    file.parent.chmod(mode)
    with pytest.raises(UntrustedFileError, match="folder may be written by others"):
        check_trusted(file)


@pytest.mark.parametrize("of", ["file", "folder"])
def test_another_users(of: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(file if of == "file" else file.parent, 4711, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UntrustedFileError, match="belongs to another user"):
        check_trusted(file)


def test_link_into_a_folder_of_others(file: Path, tmp_path: Path) -> None:
    """Both folders count: that of the link, and that of the file behind it."""
    own = tmp_path / "own"
    make_private_folder(own)
    (own / "link").symlink_to(file)
    check_trusted(own / "link")
    file.parent.chmod(0o777)
    with pytest.raises(UntrustedFileError, match="folder may be written by others"):
        check_trusted(own / "link")
    file.parent.chmod(0o755)
    own.chmod(0o777)
    with pytest.raises(UntrustedFileError, match="own may be written by others"):
        check_trusted(own / "link")


def test_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    before = os.umask(0o002)
    try:
        make_private_folder(folder)
        (folder / "file").write_text("content")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    check_trusted(folder / "file")
    folder.chmod(0o755)
    make_private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o755
