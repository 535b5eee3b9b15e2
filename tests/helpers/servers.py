"""Real servers on loopback that serve a folder: one over HTTP that can misbehave, nginx, and one that speaks S3."""

import functools
import gzip
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class WebServer:
    """Serves files in ranges. `faults` lists for each file what goes wrong with its first requests, in order.

    Faults: `drop` (half of the bytes, then the connection ends), `503`, `403`, `flip` (a bit is wrong), `short` (fewer
    bytes than asked for, as if that were all), `whole` (ranges are not known), `endless` (the bytes, then zeros until
    nobody reads them), `gzip` (the bytes compressed), `bomb` (256 MB of zeros compressed to 1 MB).
    """

    folder: Path
    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # bytes
    user: str = ""  # name:password that every request must give
    query: str = ""  # that every request must have

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, _, query = handler.path.lstrip("/").partition("?")
        path = self.folder / name
        self.requests[name] += 1
        wanted = f"Basic {b64encode(self.user.encode()).decode()}" if self.user else ""
        if handler.headers.get("Authorization", "") != wanted or query != self.query:
            handler.send_error(401)
            return
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        if fault.isdigit() or not path.is_file():
            handler.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        num_bytes = len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if asked and fault != "whole":
            content = content[int(asked[1]) : int(asked[2]) + 1]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{num_bytes}")
        else:
            handler.send_response(200)
        if fault == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "short":
            content = content[: len(content) // 2]
        if fault in ("gzip", "bomb"):
            content = gzip.compress(content) if fault == "gzip" else make_bomb()
            handler.send_header("Content-Encoding", "gzip")
        if fault == "endless":
            self._send_without_end(handler, name, content)
            return
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault == "drop":
            content = content[: len(content) // 2]
            handler.close_connection = True
        with suppress(ConnectionError):  # who asked has read enough
            handler.wfile.write(content)
            self.sent[name] += len(content)

    def _send_without_end(self, handler: BaseHTTPRequestHandler, name: str, content: bytes) -> None:
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        with suppress(ConnectionError):
            while self.sent[name] < 1 << 30:  # the end of the test, if all of it is read
                handler.wfile.write(content)
                self.sent[name] += len(content)
                content = bytes(1 << 16)


@functools.cache
def make_bomb() -> bytes:
    """What the fault `bomb` sends."""
    return gzip.compress(bytes(1 << 28), 1)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers

        def do_GET(self) -> None:
            server.answer(self)

        def do_HEAD(self) -> None:
            server.answer(self)

        def handle(self) -> None:
            with suppress(ConnectionError):  # closed by who asked, instead of the next request
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


@contextmanager
def nginx(folder: Path, scratch: Path) -> Iterator[str]:
    """URL of a real nginx that serves the folder."""
    port = _free_port()
    user = "user root; " if os.getuid() == 0 else ""  # else its worker could not read what a test wrote
    (scratch / "nginx.conf").write_text(
        f"daemon off; {user}pid {scratch}/nginx.pid; error_log {scratch}/error.log; worker_processes 1;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy;\n"
        f"fastcgi_temp_path {scratch}/fastcgi; uwsgi_temp_path {scratch}/uwsgi; scgi_temp_path {scratch}/scgi;\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    process = subprocess.Popen([nginx_program(), "-e", f"{scratch}/error.log", "-c", str(scratch / "nginx.conf")])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(f"{url}/index/dataset.json")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def s3_server() -> Iterator[str]:
    """Endpoint of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def _free_port() -> int:
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def _wait_until_it_answers(url: str) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")
