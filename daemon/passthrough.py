"""Kernel passthrough: reads, writes and maps of files that are here go to the file behind them, past this process.

Used by `daemon/mount.py` (start and end) and `daemon/operations.py` (each open and release). Everything but the
forwarding of what another thread sent runs on the trio thread; an open costs one ioctl and two dup2 more.

pyfuse3 knows nothing of passthrough, so its replies to INIT, OPEN and CREATE are changed on their way to the kernel:
its descriptor of /dev/fuse is exchanged for one end of a socket pair just before it answers, and put back after. For
INIT that is a main loop of its own, ended after the answer. For an open it is the life of the `FileInfo` that the
handler returns: pyfuse3 answers before it lets go of it, with no await between. Both are tried at start-up with a
question of our own; where one does not hold, and where the kernel or the privileges are missing, opens are plain ones.

The kernel's rule: while an inode is open passed through, each other open of it is so too, with the same backing id;
while it is open plainly, none is. Breaking it is EIO for who opens. Hence one `_Inode` for each open one. Who must not
pass beside those that do is `direct` as well: what it reads and writes then comes to us after all, but for maps.

Layouts: include/uapi/linux/fuse.h (protocol 7.40 and later, Linux 6.9).
"""

import errno
import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

import pyfuse3
import trio

from vfs import linux
from vfs.errors import MountpointError
from vfs.filesystem import FileSystem, Handle
from vfs.units import Unit

log = logging.getLogger(__name__)

PROBE = (1 << 64) - 2  # an inode number that no file has: those of files are below 2**63
_PROBE_FH = 0x5EED
_IN = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, nodeid, uid, gid, pid, extensions, padding
_OUT = struct.Struct("<IiQ")  # length, error, unique
_INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
_INIT_OUT = struct.Struct("<IIIIHHIIHHII")  # ..., flags (3), ..., flags2 (10), max_stack_depth (11); then padding
_OPEN_OUT = struct.Struct("<QIi")  # fh, open_flags, backing_id
_STORE_OUT = struct.Struct("<QQII")  # nodeid, offset, size, padding
_INIT_SIZE = _OUT.size + 64
_OPEN_SIZES = (_OUT.size + 16, _OUT.size + 128 + 16)  # of the answers to OPEN, CREATE
_OPEN = 14
_REQUEST_MOST = (1 << 20) + 8192  # bytes; the kernel refuses a smaller buffer than its largest write

_WRITEBACK_CACHE = 1 << 16
_KILLPRIV_V2 = 1 << 28  # with it no getxattr is sent before each write
_INIT_EXT = 1 << 30
_PASSTHROUGH = 1 << 5  # of flags2
_KEEP_CACHE = 1 << 1
_OPEN_DIRECT = 1 << 0  # goes before passthrough
_OPEN_NOFLUSH = 1 << 5  # closing it is not told (Linux 5.16; older kernels do not look)
_OPEN_PASSTHROUGH = 1 << 7
_NOTIFY_INVAL_ENTRY = 3
_ENTRY_OUT = struct.Struct("<QII")  # parent, length of the name, flags; then the name and a NUL
_EXPIRE_ONLY = 1  # flag of a notice; kernels before 6.2 take no notice of it, and let go of the name
_NOTIFY_STORE = 4
_BACKING_OPEN = 0x4010E501
_BACKING_CLOSE = 0x4004E502
_STACKED = frozenset({0x794C7630, 0xF15F, 0x65735546})  # overlay, ecryptfs, FUSE: themselves on top of another one
_START_S = 10.0  # the kernel asks INIT at once; a machine may be slow
_PROBE_S = 2.0
_LARGE = 1 << 20  # bytes; a file that is written for some time


class _Answer(pyfuse3.FileInfo):
    """What an open returns when its reply is to be caught: says when pyfuse3 has let go of it."""

    def __init__(self, fh: int, over: Callable[[], None]) -> None:
        self.over = over

    def __new__(cls, fh: int, over: Callable[[], None]) -> "_Answer":
        return super().__new__(cls, fh)  # type: ignore[call-arg]  # pyfuse3's takes it here

    def __del__(self) -> None:
        self.over()


@dataclass(slots=True, eq=False)
class _Inode:
    """How an inode is open now: passed through to `backing` (an id of the kernel's) or plainly (None), `opens` times.
    `key` is the file behind it, where it is passed through; `unhush` ends what keeps its writes from being told as
    another's."""

    number: int
    key: tuple[int, int]
    backing: int | None
    opens: int = 0
    unhush: Callable[[], None] | None = None


class Passthrough:
    """One mount's connection to the kernel. `state` is "on", or says why not."""

    def __init__(
        self,
        files: FileSystem,
        *,
        wanted: bool,
        places: list[bytes],
        hush: Callable[[Unit, bytes], Callable[[], None]],
    ) -> None:
        """`places`: directories whose files may be passed through. `hush`: hear of no writes in a directory of a unit,
        until what it gives is called."""
        self._files = files
        self._hush = hush
        self._wanted = wanted
        self._depth = 1 + any(map(_is_stacked, places))
        self._place = places[0]
        self._fuse = self._real = -1  # pyfuse3's descriptor, and one of ours that always is the kernel
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._inodes: dict[int, _Inode] = {}
        self._opens: dict[int, _Inode] = {}
        self._tried = trio.Event()
        self._trusted = False
        self._names: SimpleQueue[bytes | None] | None = None  # to be looked up again, as the kernel is told of them
        self.state = "off: not started" if wanted else "off: switched off"

    @property
    def on(self) -> bool:
        return self.state == "on"

    # --- start and end -----------------------------------------------------------------------------------------

    async def start(self, before: set[int]) -> None:
        """Between `pyfuse3.init` and its main loop: answer INIT. `before` are the `fuse_descriptors` of before.

        Never fails for want of passthrough: `state` says why there is none. Raises MountpointError when the kernel and
        pyfuse3 do not come together.
        """
        try:
            self._connect(before)
        except OSError as error:
            self._off(f"the connection to the kernel was not found ({error.strerror})")
            return
        with trio.move_on_after(_START_S) as scope:
            await self._answer_init()
        if scope.cancelled_caught:
            raise MountpointError(
                "the kernel did not begin to talk to the mount: unmount what is left of it, mount again"
            )
        log.info("passthrough: %s", self.state)

    def _connect(self, before: set[int]) -> None:
        found = fuse_descriptors() - before
        if len(found) != 1:
            raise OSError(errno.ENOENT, f"{len(found)} descriptors of /dev/fuse")
        (self._fuse,) = found
        self._real = os.dup(self._fuse)
        self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._peer.setblocking(False)

    @property
    def _ours(self) -> socket.socket:
        assert self._pair is not None
        return self._pair[0]

    @property
    def _peer(self) -> socket.socket:
        assert self._pair is not None
        return self._pair[1]

    async def _answer_init(self) -> None:
        await trio.lowlevel.wait_readable(self._real)
        request = os.read(self._real, _REQUEST_MOST)
        self._divert()
        async with trio.open_nursery() as nursery:
            ended = trio.Event()
            nursery.start_soon(_main_loop, ended)
            self._peer.send(request)
            reply = await self._receive()
            if self._wanted:
                await self._try_answers()
            while not ended.is_set():  # it has several workers, and each waits for itself
                trio.lowlevel.notify_closing(self._fuse)
                await trio.lowlevel.checkpoint()
        self._restore()
        os.write(self._real, with_flags(reply, request, self._depth if self._trusted else 0))
        if self._trusted:
            self._probe_backing(request)

    async def _receive(self) -> bytes:
        await trio.lowlevel.wait_readable(self._peer.fileno())
        return self._peer.recv(_REQUEST_MOST)

    async def _try_answers(self) -> None:
        """Ask pyfuse3 an open of our own: it must answer right after the handler and then let go of what that
        returned. `_judge` sees whether it did."""
        body = struct.pack("<II", os.O_RDONLY, 0)
        header = _IN.pack(_IN.size + len(body), _OPEN, 1 << 40, PROBE, os.getuid(), os.getgid(), os.getpid(), 0, 0)
        self._peer.send(header + body)
        with trio.move_on_after(_PROBE_S):
            await self._tried.wait()
        if not self._trusted:
            self._off("this pyfuse3 answers opens in another way than expected")
            with trio.move_on_after(_PROBE_S):
                await self._receive()  # it is no answer for the kernel

    def probe(self) -> pyfuse3.FileInfo:
        """The handler's answer to our own question."""
        return _Answer(_PROBE_FH, self._judge)

    def _judge(self) -> None:
        try:
            reply = self._peer.recv(_REQUEST_MOST)
        except BlockingIOError:
            reply = b""
        if len(reply) == _OPEN_SIZES[0] and _OPEN_OUT.unpack(reply[-16:])[0] == _PROBE_FH:
            self._trusted = True
        self._tried.set()

    def _probe_backing(self, request: bytes) -> None:
        """Whether the kernel takes a file of ours."""
        if not _offers_passthrough(request):
            self._off("this kernel has no passthrough (Linux 6.9 and later)")
            return
        try:
            fd = os.open(self._place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._off(f"{os.fsdecode(self._place)}: {error.strerror}")
            return
        try:
            self._close_backing(self._open_backing(fd))
            self.state = "on"
        except OSError as error:
            self._off(
                "it needs CAP_SYS_ADMIN: run the daemon as root"
                if error.errno == errno.EPERM
                else f"the kernel refused a file in {os.fsdecode(self._place)}: {error.strerror}"
            )
        finally:
            os.close(fd)

    def _off(self, why: str) -> None:
        self.state = f"off: {why}"

    # --- names -------------------------------------------------------------------------------------------------

    def expire_name(self, parent: int, name: bytes) -> None:
        """Have the kernel look a name up again, soon. Not as pyfuse3 can, which takes it away: then a process that
        works in that directory has no working directory any more."""
        if self._real < 0:
            pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
            return
        if self._names is None:
            self._names = SimpleQueue()
            threading.Thread(target=self._expire, args=(self._names,), name="expire", daemon=True).start()
        body = _ENTRY_OUT.pack(parent, len(name), _EXPIRE_ONLY) + name + b"\0"
        self._names.put(_OUT.pack(_OUT.size + len(body), _NOTIFY_INVAL_ENTRY, 0) + body)

    def _expire(self, names: "SimpleQueue[bytes | None]") -> None:
        """In a thread of its own: the kernel may wait for a handler of ours to be done with the directory."""
        while (message := names.get()) is not None:
            self._send(message)

    def close(self) -> None:
        """Let go of the kernel, before pyfuse3 does: it is told of an end when the last descriptor is closed."""
        if self._names is not None:
            self._names.put(None)
        if self._real >= 0:
            os.close(self._real)
            self._real = -1
        for end in self._pair or ():
            end.close()

    # --- opens -------------------------------------------------------------------------------------------------

    def answer(self, handle: Handle, fh: int, *, keep_cache: bool) -> pyfuse3.FileInfo:
        """What an open handler returns, as the last thing it does: nothing may be awaited after this.

        Raises ESTALE when the inode is open with another file behind it, which was exchanged for this one (the record
        came back into its directory): the kernel then looks the name up again, and finds the new inode.
        """
        if not self.on:
            return self._plain(handle, fh, keep_cache)
        inode = self._inodes.get(handle.node.ino)
        may = inode is not None or not self._files.is_kept(handle)
        may = may and self._may(handle)
        if inode is None:
            inode = self._first(handle, self._register(handle.fd) if may else None)
        elif inode.backing is not None and inode.key != _key(handle.fd):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        inode.opens += 1
        self._opens[fh] = inode
        if inode.backing is None:
            return self._plain(handle, fh, keep_cache)
        handle.passed = True
        handle.node.stamp = None  # what the kernel keeps of plain opens is not what is written past it
        self._hush_own(inode, handle)
        backing, flags = inode.backing, _OPEN_PASSTHROUGH | (0 if may else _OPEN_DIRECT) | self._quiet(handle)
        return self._caught(fh, lambda reply: passed_through(reply, backing, flags))

    def _plain(self, handle: Handle, fh: int, keep_cache: bool) -> pyfuse3.FileInfo:
        quiet = self._quiet(handle)
        if not quiet or not self._trusted or self._real < 0:
            return pyfuse3.FileInfo(fh=fh, keep_cache=keep_cache)
        flags = quiet | (_KEEP_CACHE if keep_cache else 0)
        return self._caught(fh, lambda reply: passed_through(reply, 0, flags))

    def _quiet(self, handle: Handle) -> int:
        """The flag that saves the question at each close."""
        return 0 if self._files.has_to_sync(handle) else _OPEN_NOFLUSH

    def _caught(self, fh: int, change: Callable[[bytes], bytes]) -> pyfuse3.FileInfo:
        answer = _Answer(fh, lambda: self._send_caught(change))
        self._divert()
        return answer

    def store(self, inode: int, content: bytes | bytearray | memoryview) -> bool:
        """Give the kernel the whole content of a file that nobody has open; whether it took it.

        Called before an open of the file is answered, so that nothing is asked for these bytes: no read, and no
        attributes after it. It would wait for a read of the same page that is under way, which is ours to answer: hence
        "nobody". fuse_notify_store in fs/fuse/dev.c.
        """
        if self._real < 0:
            return False
        size = _OUT.size + _STORE_OUT.size + len(content)
        head = _OUT.pack(size, _NOTIFY_STORE, 0) + _STORE_OUT.pack(inode, 0, len(content), 0)
        try:
            return os.writev(self._real, [head, content]) == size
        except OSError as error:
            log.debug("the kernel did not take the content of a file: %s", error)
            return False

    def _may(self, handle: Handle) -> bool:
        try:
            return self._files.may_pass(handle)
        except OSError as error:
            log.debug("not passed through: %s", error)
            return False

    def _hush_own(self, inode: _Inode, handle: Handle) -> None:
        """Nobody needs to be told of the writes to a large file that is written past us: its unit is dirty, and what
        the kernel keeps of it is right. Being told slows the writer."""
        if inode.unhush is None and handle.writable and not handle.node.unit.evicted and handle.stamp[0] >= _LARGE:
            with suppress(FileNotFoundError):  # it has no name any more: there is nothing to tell
                inode.unhush = self._hush(handle.node.unit, handle.node.path.rpartition(b"/")[0])

    def _first(self, handle: Handle, backing: int | None) -> _Inode:
        key = _key(handle.fd) if backing is not None else (0, 0)
        inode = self._inodes[handle.node.ino] = _Inode(handle.node.ino, key, backing)
        return inode

    def released(self, fh: int) -> None:
        """The kernel has let go of an open file."""
        inode = self._opens.pop(fh, None)
        if inode is None:
            return
        inode.opens -= 1
        if inode.opens == 0:
            del self._inodes[inode.number]
            if inode.unhush is not None:
                inode.unhush()
            if inode.backing is not None:
                self._close_backing(inode.backing)

    def _register(self, fd: int) -> int | None:
        try:
            return self._open_backing(fd)
        except OSError as error:  # a file system stacked too high, or out of memory: this file is open plainly
            log.debug("not passed through: %s", error)
            return None

    def _open_backing(self, fd: int) -> int:
        # A buffer that can be changed: for another one, Python gives its content and not the kernel's answer.
        backing: int = fcntl.ioctl(self._real, _BACKING_OPEN, bytearray(struct.pack("<iIQ", fd, 0, 0)))
        return backing

    def _close_backing(self, backing: int) -> None:
        fcntl.ioctl(self._real, _BACKING_CLOSE, struct.pack("<I", backing))

    # --- catching replies --------------------------------------------------------------------------------------

    def _divert(self) -> None:
        os.dup2(self._ours.fileno(), self._fuse, inheritable=False)

    def _restore(self) -> None:
        os.dup2(self._real, self._fuse, inheritable=False)

    def _send_caught(self, change: Callable[[bytes], bytes]) -> None:
        """pyfuse3 has answered an open: hand it on, changed. Another thread may have told the kernel something in this
        moment; that is handed on too, by a thread, as it may wait for an answer of ours."""
        self._restore()
        answered = False
        while True:
            try:
                message = self._peer.recv(_REQUEST_MOST)
            except BlockingIOError:
                break
            if _OUT.unpack_from(message)[2] == 0:
                threading.Thread(target=self._send, args=(message,), daemon=True).start()
            else:
                answered = True
                self._send(change(message))
        if not answered:
            log.error("an open was not answered as expected: nothing is passed through from here on; please report")
            self._trusted = False
            self._off("an open was not answered as expected")

    def _send(self, message: bytes) -> None:
        try:
            os.write(self._real, message)
        except OSError as error:
            log.debug("the kernel did not want an answer any more: %s", error)


async def _main_loop(ended: trio.Event) -> None:
    await pyfuse3.main()
    ended.set()


def with_flags(reply: bytes, request: bytes, depth: int) -> bytes:
    """The reply to INIT with what pyfuse3 does not ask for: HANDLE_KILLPRIV_V2, and passthrough for files on file
    systems stacked less than `depth` high (0: none). Only what the kernel offered in its request; a reply of another
    form is left as it is."""
    if len(reply) != _INIT_SIZE or _OUT.unpack_from(reply)[1] != 0:
        return reply
    offered = _INIT_IN.unpack_from(request, _IN.size)[3]
    fields = list(_INIT_OUT.unpack_from(reply, _OUT.size))
    fields[3] |= offered & _KILLPRIV_V2
    if depth and _offers_passthrough(request) and not fields[3] & _WRITEBACK_CACHE:
        fields[3] |= _INIT_EXT
        fields[10] |= _PASSTHROUGH
        fields[11] = depth
    return reply[: _OUT.size] + _INIT_OUT.pack(*fields) + reply[_OUT.size + _INIT_OUT.size :]


def _offers_passthrough(request: bytes) -> bool:
    *_front, flags, flags2 = _INIT_IN.unpack_from(request, _IN.size)
    return bool(flags & _INIT_EXT and flags2 & _PASSTHROUGH)


def passed_through(reply: bytes, backing: int, more: int = _OPEN_PASSTHROUGH) -> bytes:
    """The reply to OPEN or CREATE with `more` flags and a backing file; one that tells an error is left as it is."""
    if len(reply) not in _OPEN_SIZES:
        return reply
    fh, flags, _none = _OPEN_OUT.unpack(reply[-_OPEN_OUT.size :])
    return reply[: -_OPEN_OUT.size] + _OPEN_OUT.pack(fh, flags & ~_KEEP_CACHE | more, backing)


def fuse_descriptors() -> set[int]:
    """The numbers of this process's descriptors of /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # it was the one that listed them
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return found


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_stacked(place: bytes) -> bool:
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return linux.file_system(fd) in _STACKED
    finally:
        os.close(fd)
