"""A small HTTP server on this machine for the tests: it serves files by range request, counts bytes and injects faults."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FileServer(ThreadingHTTPServer):
    """
    Serves the files below `folder`.

    `requests` holds (method, path, range header) of each request, and `sent` counts the bytes of bodies sent. The next `drop` bodies are cut
    in the middle. Paths in `refused` are answered with 403; paths in `stalled` with half a body, then nothing until the server ends.
    `statuses` maps paths to [status, number of answers with this status], and `told` maps paths to headers that replace the ETag.
    `ranges` is the Accept-Ranges header, or `None` for no header. If it is not "bytes", the server ignores ranges and sends whole files.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler=None):
        super().__init__(("127.0.0.1", 0), handler or FileHandler)
        self.folder, self.requests, self.sent, self.drop, self.refused = Path(folder), [], 0, 0, set()
        self.stalled, self.ended = set(), threading.Event()
        self.statuses, self.told, self.ranges = {}, {}, "bytes"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class FileHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path in self.server.refused:
            self.reply(403, b"refused", body)  # a body after a HEAD would be read as the next answer
            return
        failing = self.server.statuses.get(path, [0, 0])
        if failing[1] > 0:
            failing[1] -= 1
            self.reply(failing[0], b"failed", body)
            return
        file = (self.server.folder / path.lstrip("/")).resolve()
        if not file.is_relative_to(self.server.folder.resolve()) or not file.is_file():
            self.reply(404, b"not found", body)
            return
        facts = file.stat()
        told = {"ETag": f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'}
        self.send_file(file, body, **self.server.told.get(path, told))

    def send_file(self, file: Path, body: bool, **headers: str) -> None:
        data = file.read_bytes()
        wanted, status = self.headers.get("Range"), 200
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        if self.server.ranges is not None:
            headers["Accept-Ranges"] = self.server.ranges
        if wanted and self.server.ranges == "bytes":
            first, last = wanted.removeprefix("bytes=").split("-")
            begin = int(first) if first else len(data) - int(last)
            end = min(int(last), len(data) - 1) if first and last else len(data) - 1
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        self.reply(status, data, body, **headers)

    def reply(self, status: int, data: bytes, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if self.server.drop > 0 and len(data) > 1:
            self.server.drop -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if unquote(urlsplit(self.path).path) in self.server.stalled:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = self.server.ended.wait(60)
            return
        self.wfile.write(data)
        self.server.sent += len(data)


@contextlib.contextmanager
def serve(folder: Path, server_class=FileServer):
    server = server_class(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
