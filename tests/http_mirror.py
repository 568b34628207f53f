"""A mirror on this machine, and every way in which mirrors fail."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Mirror:
    """What a server serves, and what it was asked for.

    Attributes:
        url: its address.
        files: content by path.
        failures: HTTP statuses by path, one an answer, before the file is served; 0 stands for half of the answer,
            after which the connection breaks off.
        chunk_bytes: above 0: answers come in chunks of so many bytes and do not say how long they are; where one breaks
            off, the last chunk may be cut.
        requests: path of every request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    chunk_bytes: int = 0
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve(mirror: Mirror) -> Iterator[Mirror]:
    """Serve until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, mirror)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, mirror: Mirror) -> None:
    path = handler.path
    mirror.requests.append(path)
    failures = mirror.failures.get(path, [])
    failure = failures.pop(0) if failures else None
    content = mirror.files.get(path)
    if failure or content is None:
        handler.send_response(failure or 404)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    handler.send_response(200)
    breaks_off = failure == 0
    end = len(content) // 2 if breaks_off else len(content)
    if mirror.chunk_bytes:
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, end, mirror.chunk_bytes):
            chunk = content[start : start + mirror.chunk_bytes]
            handler.wfile.write(b"%x\r\n" % len(chunk) + chunk[: end - start])
            handler.wfile.write(b"\r\n" if start + len(chunk) <= end else b"")
        handler.wfile.write(b"" if breaks_off else b"0\r\n\r\n")
    else:
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:end])
    handler.close_connection = handler.close_connection or breaks_off
