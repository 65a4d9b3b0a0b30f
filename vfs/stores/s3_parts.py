"""Multipart uploads to S3 that go on where an interrupted one was, and the sweeping of those nobody goes on with.

Used by `remote.py` where the credentials are plain keys (`s3_signing.py`); opendal, which moves everything else, tells
no upload ids. Blocks its caller, at most for the budget and a moment; `FLIGHTS` parts are under way at a time, each in
memory once.

An upload to a key first looks whether one was begun there. A part that is there counts only if the store's MD5 of it is
that of the local bytes. The parts' ETags are told when the upload is completed, and the store refuses when one is not
what it has: two who go on with one upload never mix their bytes. The condition (absent, same version) holds at
completion.
"""

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from vfs.errors import Conflict, StoreError
from vfs.stores import checksums
from vfs.stores.http_requests import Client, Reply
from vfs.stores.limits import Budget, Limits
from vfs.stores.remote_config import Target
from vfs.stores.s3_signing import Signer, signer

FLIGHTS = 4  # parts at a time: 8 were not faster and doubled the memory
ANSWER = 16 * 1024 * 1024  # bytes of an answer at most: a page of a listing has 1,000 entries
COMPLETION = 64 * 1024 * 1024  # bytes whose moving takes as long as we wait for a completion: stores may copy then

T = TypeVar("T")
Parts = Mapping[int, "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the store has."""

    etag: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Pending:
    """An upload that was begun and not completed. Seconds since the epoch."""

    key: str
    id: str
    initiated: float


class Ended(StoreError):
    """The upload is not there any more: it was completed, or aborted."""


class Uploads:
    """The multipart uploads of one store. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits, signed: Signer) -> None:
        self._name = target.name
        self._prefix = f"{target.prefix}/" if target.prefix else ""
        self._limits = limits
        self._signer = signed
        self._client = Client(target.name, limits, secrets=target.secrets())
        self._lock = threading.Lock()
        self._ours: set[str] = set()  # uploads that this process works on

    def close(self) -> None:
        self._client.close()

    def send(
        self,
        key: str,
        piece: Callable[[int, int], bytes],
        size: int,
        condition: Mapping[str, str],
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> tuple[tuple[str, str], Conflict | None]:
        """Upload an object in parts. Gives our checksum of it, and the Conflict when a condition did not hold: it may
        be our own completion, sent twice. `condition`: headers. Raises StoreError, and what `piece` raises."""
        with self._claimed(key, budget) as (upload, present):
            try:
                tags = self._send_parts(key, upload, piece, size, present, progress, budget)
            except StoreError:
                raise  # what is there stays for the next try
            except Exception:
                self._abort_quietly(key, upload)  # the source failed: nobody will go on with these bytes
                raise
            digests = b"".join(bytes.fromhex(tag) for tag, _ in tags)
            whole = hashlib.md5(digests, usedforsecurity=False).hexdigest()
            lost = self._complete(key, upload, [etag for _, etag in tags], condition, budget)
            return (checksums.MD5_PARTS, f"{whole}-{len(tags)}"), lost

    def pending(self, budget: Budget, key: str | None = None) -> Iterator[Pending]:
        """The uploads that were begun under the store's prefix, or to one key."""
        prefix = self._prefix + (key or "")
        markers: dict[str, str] = {}
        while True:
            answer = self._ask("list", "", "GET", {"uploads": "", "prefix": prefix, **markers}, budget)
            for each in answer.findall("Upload"):
                found = Pending(_text(each, "Key"), _text(each, "UploadId"), _time(_text(each, "Initiated")))
                if found.id and (found.key == prefix if key is not None else found.key.startswith(prefix)):
                    yield found
            after = {
                "key-marker": _text(answer, "NextKeyMarker"),
                "upload-id-marker": _text(answer, "NextUploadIdMarker"),
            }
            if _text(answer, "IsTruncated") != "true" or after == markers or not after["key-marker"]:
                return
            markers = after

    def sweep(self, older_than_s: float, budget: Budget) -> int:
        """Abort the uploads that nobody went on with for so long; how many."""
        before = datetime.now(UTC).timestamp() - older_than_s
        swept = 0
        try:
            pending = list(self.pending(budget))
        except Ended:  # how `rclone serve s3` says that there are none
            return 0
        for each in pending:
            if each.initiated > before or each.id in self._ours:
                continue
            key = each.key[len(self._prefix) :]
            with contextlib.suppress(Ended):
                parts = self._parts(key, each.id, budget)
                if all(part.modified <= before for part in parts.values()):
                    self._ask("sweep", key, "DELETE", {"uploadId": each.id}, budget)
                    swept += 1
        return swept

    # One upload
    # ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _claimed(self, key: str, budget: Budget) -> Iterator[tuple[str, Parts]]:
        """An upload to this key that nobody else in this process works on, and the parts it has."""
        upload = self._begun(key, budget) or self._begin(key, budget)
        try:
            yield upload, self._parts(key, upload, budget)
        finally:
            with self._lock:
                self._ours.discard(upload)

    def _begun(self, key: str, budget: Budget) -> str | None:
        try:
            found = sorted(self.pending(budget, key), key=lambda each: each.initiated, reverse=True)
        except StoreError as error:  # it may not be asked, or the server has no such question: so a new one
            if error.temporary:
                raise
            return None
        for each in found:
            if self._claim(each.id):
                return each.id
        return None

    def _begin(self, key: str, budget: Budget) -> str:
        upload = _text(self._ask("upload", key, "POST", {"uploads": ""}, budget), "UploadId")
        if not upload:
            raise StoreError(f"{self._name}: upload {key}: the store's answer has no upload id")
        self._claim(upload)
        return upload

    def _claim(self, upload: str) -> bool:
        with self._lock:
            free = upload not in self._ours
            self._ours.add(upload)
            return free

    def _parts(self, key: str, upload: str, budget: Budget) -> Parts:
        found: dict[int, Part] = {}
        marker = ""
        while True:
            query = {"uploadId": upload, **({"part-number-marker": marker} if marker else {})}
            answer = self._ask("upload", key, "GET", query, budget)
            for each in answer.findall("Part"):
                number, size = _text(each, "PartNumber"), _text(each, "Size")
                if number.isdigit() and size.isdigit():
                    modified = _time(_text(each, "LastModified"))
                    found[int(number)] = Part(_text(each, "ETag").strip('"'), int(size), modified)
            before, marker = marker, _text(answer, "NextPartNumberMarker")
            if _text(answer, "IsTruncated") != "true" or not marker or marker == before:
                return found

    def _send_parts(
        self,
        key: str,
        upload: str,
        piece: Callable[[int, int], bytes],
        size: int,
        present: Parts,
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> list[tuple[str, str]]:
        """Bring every part that is not there yet. For each part our MD5 and the store's ETag."""
        step = checksums.part_size(size)
        tags: list[tuple[str, Future[str] | str]] = []
        flights: deque[Future[str]] = deque()
        with ThreadPoolExecutor(FLIGHTS, thread_name_prefix="runfs-parts") as pool:
            for number, offset in enumerate(range(0, size, step), 1):
                data = piece(offset, min(step, size - offset))
                tag = hashlib.md5(data, usedforsecurity=False).hexdigest()
                there = present.get(number)
                if there is not None and (there.etag, there.size) == (tag, len(data)):
                    tags.append((tag, there.etag))
                else:
                    if len(flights) == FLIGHTS:
                        flights.popleft().result()
                    flights.append(pool.submit(self._put, key, upload, number, data, budget))
                    tags.append((tag, flights[-1]))
                if progress is not None:
                    progress(offset + len(data))
        return [(tag, each if isinstance(each, str) else each.result()) for tag, each in tags]

    def _put(self, key: str, upload: str, number: int, data: bytes, budget: Budget) -> str:
        query = {"partNumber": str(number), "uploadId": upload}

        def handle(reply: Reply) -> str:
            etag = (reply.header("ETag") or "").strip('"')
            if not etag:
                raise StoreError(f"{self._name}: upload {key}: the store took a part without an ETag")
            return etag

        return self._request("upload", key, "PUT", query, budget, handle, body=data)

    def _complete(
        self, key: str, upload: str, tags: list[str], condition: Mapping[str, str], budget: Budget
    ) -> Conflict | None:
        """Make it visible, if the condition holds."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{escape(tag)}&quot;</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        query = {"uploadId": upload}
        try:
            self._ask("upload", key, "POST", query, budget, body=body, extra=condition, wait=COMPLETION)
        except Conflict as lost:
            self._abort_quietly(key, upload)
            return lost
        except Ended as ended:  # our own first try, or somebody who had the same upload
            return Conflict(str(ended))
        return None

    def _abort_quietly(self, key: str, upload: str) -> None:
        with contextlib.suppress(StoreError):  # `sweep` gets what stays
            self._ask("abort", key, "DELETE", {"uploadId": upload}, self._limits.budget(None))

    # Requests
    # ----------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        operation: str,
        key: str,
        method: str,
        query: Mapping[str, str],
        budget: Budget,
        *,
        body: bytes = b"",
        extra: Mapping[str, str] | None = None,
        wait: int = 0,
    ) -> ElementTree.Element:
        """The XML of an answer; an empty element where it has none."""

        def handle(reply: Reply) -> ElementTree.Element:
            answer = parsed_xml(reply.body(ANSWER))
            if answer.tag == "Error":  # S3 may begin a completion with 200 and fail after it
                raise self._refused(operation, key, reply, answer)
            return answer

        return self._request(operation, key, method, query, budget, handle, body=body, extra=extra, wait=wait)

    def _request(
        self,
        operation: str,
        key: str,
        method: str,
        query: Mapping[str, str],
        budget: Budget,
        handle: Callable[[Reply], T],
        *,
        body: bytes = b"",
        extra: Mapping[str, str] | None = None,
        wait: int = 0,
    ) -> T:
        address = self._signer.address(self._prefix + key if key else "", query)

        def checked(reply: Reply) -> T:
            if reply.status not in (200, 204):
                raise self._refused(operation, key, reply, parsed_xml(reply.body(ANSWER)))
            result = handle(reply)
            reply.body(1)  # to its end, so that the connection can be kept
            return result

        return self._client.run(
            (operation, key),
            method,
            address,
            checked,
            budget,
            headers=lambda: self._signer.headers(method, address, query, body, extra),
            body=body,
            wait=wait,
        )

    def _refused(self, operation: str, key: str, reply: Reply, answer: ElementTree.Element) -> StoreError:
        code = _text(answer, "Code")
        what = f"{self._name}: {operation} {key}".rstrip()
        if reply.status == 412 or code == "PreconditionFailed":
            return Conflict(f"{what}: somebody else wrote it meanwhile")
        if code == "NoSuchUpload":
            return Ended(f"{what}: the upload is not there any more")
        failure = self._client.failure((operation, key), reply, code)
        if code in ("InternalError", "SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"):
            failure.temporary = True
        return failure


def uploads(target: Target, limits: Limits) -> Uploads | None:
    """The uploads of a store, or None where its requests need more than plain keys."""
    signed = signer(target)
    return None if signed is None else Uploads(target, limits, signed)


def parsed_xml(body: bytes) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return ElementTree.Element("None")
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
    return root


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _time(text: str) -> float:
    """Seconds since the epoch; now, where the store does not tell (so it is not old)."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return datetime.now(UTC).timestamp()
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
