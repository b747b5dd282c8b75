"""The operating system's calls the disk tier makes, in one place so that tests can fail them.

Every path is one name relative to an open directory, and no call follows a symbolic link: a
link planted below the root leads nowhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence

_CLOEXEC = os.O_CLOEXEC | os.O_NOFOLLOW


class Calls:
    """Thin, stateless. All but :meth:`close` raise OSError."""

    def open_root(self, path: str, create: bool) -> int:
        """The root itself may be a link: the operator named it."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
        os.makedirs(path, 0o700, exist_ok=True)
        return os.open(path, flags)

    def open_directory(self, name: str, parent: int) -> int:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC, dir_fd=parent)

    def make_directory(self, name: str, parent: int) -> None:
        os.mkdir(name, 0o700, dir_fd=parent)

    def remove_directory(self, name: str, parent: int) -> None:
        os.rmdir(name, dir_fd=parent)

    def list_directory(self, directory: int) -> list[str]:
        return os.listdir(directory)

    def create(self, name: str, directory: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=directory)

    def open_file(self, name: str, directory: int) -> int:
        # Not blocking: a pipe under an entry's name must not hang the reader.
        return os.open(name, os.O_RDONLY | os.O_NONBLOCK | _CLOEXEC, dir_fd=directory)

    def write(self, fd: int, parts: Sequence[memoryview]) -> int:
        return os.writev(fd, parts)

    def seek(self, fd: int, offset: int) -> None:
        os.lseek(fd, offset, os.SEEK_SET)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        return os.preadv(fd, [into], offset)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def replace(self, source: str, target: str, source_directory: int, target_directory: int):
        os.replace(source, target, src_dir_fd=source_directory, dst_dir_fd=target_directory)

    def remove(self, name: str, directory: int) -> None:
        os.unlink(name, dir_fd=directory)

    def stat(self, name: str, directory: int) -> os.stat_result:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)

    def stat_open(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def set_time(self, fd: int, ns: int) -> None:
        os.utime(fd, ns=(ns, ns))

    def set_time_of(self, name: str, directory: int, ns: int) -> None:
        os.utime(name, ns=(ns, ns), dir_fd=directory, follow_symlinks=False)

    def lock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def close(self, fd: int) -> None:
        """Of what was not written to, so that a failure says nothing; the descriptor is gone."""
        with contextlib.suppress(OSError):
            os.close(fd)

    def close_written(self, fd: int) -> None:
        """Some file systems say only now that what was written did not fit."""
        os.close(fd)
