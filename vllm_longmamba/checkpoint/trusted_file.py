"""Files that are read without being named: only where nobody else can have written them, as ssh reads its own."""

import os
import stat
from pathlib import Path


class UntrustedFileError(ValueError):
    """A file that somebody else may have written; the message says why and what to do."""


def check_trusted(path: Path) -> None:
    """Refuse a file that another user than this one, or root, owns or may write; the same for its folder.

    In a folder that nobody else can enter the file's own mode says nothing.

    Raises:
        UntrustedFileError: somebody else may have written the file.
        OSError: there is no such file.
    """
    real = path.resolve(strict=True)
    folders = {path.parent, real.parent}
    for folder in sorted(folders):
        _check(folder)
    is_private = all(stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0 for folder in folders)
    _check(real, ignore_mode=is_private)


def make_private_folder(folder: Path) -> None:
    """Make a folder that nobody else can enter; one that exists stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _check(path: Path, ignore_mode: bool = False) -> None:
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise UntrustedFileError(f"{path} belongs to another user (uid {status.st_uid}); remove it")
    if not ignore_mode and stat.S_IMODE(status.st_mode) & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise UntrustedFileError(
            f"{path} may be written by others (mode {mode:04o}); `chmod go-w {path}`, if nobody else has changed it"
        )
