"""A web server for tests that answers whatever a test says: truncated, contradictory or malicious, on loopback.

`lying(answer)` as a context manager gives its address. `answer(request)` gets the handler (its `command`, `path` and
`headers`) and gives `(status, headers, body)`; Content-Length is the body's unless the headers say something else. The
connection is closed after each answer, so that a body that is too short ends there.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, Mapping[str, str], bytes]
Answering = Callable[[BaseHTTPRequestHandler], Answer]


@contextlib.contextmanager
def lying(answer: Answering) -> Iterator[str]:
    """The address of a server that answers like that."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET
        do_PUT = do_GET
        do_POST = do_GET
        do_DELETE = do_GET
        do_PROPFIND = do_GET
        do_MKCOL = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ranged(request: BaseHTTPRequestHandler, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    """What an honest server answers for this content."""
    asked = request.headers.get("Range")
    if asked is None:
        return 200, headers or {}, body
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(body)), len(body) - 1)
    if start >= len(body):
        return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
    given = {"Content-Range": f"bytes {start}-{end}/{len(body)}", **(headers or {})}
    return 206, given, body[start : end + 1]
