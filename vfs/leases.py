"""Write leases on many files: proof that nobody else has them open while they are compared and dropped.

Used by evict. Holding one makes an opener wait (or get EWOULDBLOCK), so leases are held for moments only.
"""

import errno
import os
import resource
from collections.abc import Mapping

from vfs import cache, linux
from vfs.errors import Refused
from vfs.journal import Known
from vfs.parents import Parents
from vfs.scan import Seen

_SPARE_DESCRIPTORS = 256  # for everything else the process does meanwhile


class Leases:
    """Leases on the files of one unit, compared with what was digested. Use as a context manager."""

    def __init__(self, uuid: str, root: bytes, *, writable: bool = False) -> None:
        self._uuid = uuid
        self._writable = writable  # for files of ours: opening one again under a lease would break it
        self._root = root
        self._held: dict[bytes, int] = {}
        self.used_bytes = 0  # of the disk, by what is leased

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *_exc: object) -> None:
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def take(self, known: Mapping[bytes, Known]) -> None:
        """Lease every regular file and compare it with its digest's stat. Raises Refused naming the first that is
        open (and in which process), has changed or is gone."""
        files = {path: item for path, item in known.items() if item.file.kind == "file" and not item.file.same}
        if len(files) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS:
            raise Refused(
                f"{self._uuid} has {len(files):,} files, more than this process may hold open while it checks them; "
                "raise the limit (ulimit -n, LimitNOFILE=) and mount again"
            )
        with Parents(self._root) as parents:
            for path, item in files.items():
                self._take_one(parents, path, item)

    def _take_one(self, parents: Parents, path: bytes, item: Known) -> None:
        try:
            directory, name = parents.of(path)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            raise Refused(f"{self._uuid}: not evicted: {_shown(path)} was removed just now; try again") from None
        if self._writable:
            own = cache.open_writable(fd)
            os.close(fd)
            fd = own
        self._held[path] = fd
        try:
            free = linux.lease(fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES):
                raise Refused(
                    f"{self._uuid}: not evicted: the file system cannot tell whether {_shown(path)} is open "
                    f"({error.strerror}); only the owner of the files, or root, can evict them"
                ) from error
            raise
        status = os.fstat(fd)
        if not free:
            owners = linux.owners_of(status.st_dev, status.st_ino)
            who = ", ".join(f"{name}[{pid}]" for pid, name in owners[:3]) or "some process"
            raise Refused(f"{self._uuid}: not evicted: {_shown(path)} is open in {who}; close it and try again")
        if not Seen(path, status).matches(item):
            raise Refused(
                f"{self._uuid}: not evicted: {_shown(path)} changed since it was pushed; runfs push {self._uuid}"
            )
        self.used_bytes += status.st_blocks * 512

    def held(self) -> bool:
        """Whether nobody has tried to open any of them since."""
        return all(linux.lease_held(fd) for fd in self._held.values())

    def descriptors(self) -> Mapping[bytes, int]:
        return self._held


def _shown(path: bytes) -> str:
    return os.fsdecode(path)
