"""A fake of Google Cloud Storage in this process, with faults, for the clients that pemoe_jax uses.

tensorstore takes the address of the server from a variable. TensorFlow's client does not: the
server is its HTTPS proxy, and answers in place of www.googleapis.com. Nothing leaves the machine.
"""

import contextlib
import itertools
import json
import pathlib
import re
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http import server
from typing import Any

Fault = str | None  # 'lose' the request, lose the 'answer' to it, 'delay' it, or 503: 'busy'


class FakeGcs:
    """Buckets, as `name` -> (content, generation) of the objects `bucket/name`.

    Attributes:
      objects: the objects of all buckets.
      fault: function from (method, name of the object or '') to the fault of this request.
      log: (method, name) of each request.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.fault: Callable[[str, str], Fault] = lambda method, name: None
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.sessions: dict[str, tuple[str, bytearray]] = {}
        self.numbers = itertools.count(1)

    def read(self, path: object) -> bytes:
        """Returns the content of the object of a `gs://` path."""
        return self.objects[str(path).removeprefix("gs://")][0]

    def names(self, path: object) -> list[str]:
        """Returns the names of the objects in the folder of a `gs://` path."""
        prefix = str(path).removeprefix("gs://").rstrip("/") + "/"
        return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any] | None:
        """Writes an object; returns its metadata, None if its generation is not the expected."""
        generation = self.objects.get(name, (b"", 0))[1]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return None
        self.objects[name] = content, next(self.numbers)
        return self.about(name)

    def about(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        return {
            "name": name.split("/", 1)[1],
            "size": str(len(content)),
            "generation": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for path in sorted(self.objects):
            name = path.removeprefix(f"{bucket}/")
            is_after = name >= query.get("startOffset", "")
            is_before = name < query.get("endOffset", "\U0010ffff")
            if path == name or not name.startswith(prefix) or not is_after or not is_before:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.about(path))
        return {"items": items, "prefixes": sorted(prefixes)}


class _Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: FakeGcs
    tls: ssl.SSLContext

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        if not self.path.endswith("googleapis.com:443"):
            return self.send_error(403)
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = (
            self.connection.makefile(m, buffering=b) for m, b in (("rb", -1), ("wb", 0))
        )

    def _answer(self, status: int, body: bytes | dict | None = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        body = self._read_body()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = url.path.removeprefix("/download")
        parts = [urllib.parse.unquote(part) for part in path.split("/")]
        match = re.match(r"(?:/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?", path)
        if match:
            name = f"{match[1]}/{urllib.parse.unquote(match[2] or query.get('name', ''))}"
        else:
            name = "/".join(parts[1:])
        fault = self.gcs.fault(self.command, name)
        self.gcs.log.append((self.command, name))
        if fault == "delay":
            time.sleep(0.2)
        if fault == "busy":
            return self._answer(503)
        if fault != "lose":
            with self.gcs.lock:
                status, content, headers = self._handle(path, match, name, query, body)
            if fault != "answer":
                return self._answer(status, content, **headers)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(
        self, path: str, match: re.Match | None, name: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes | dict | None, dict[str, str]]:
        """Returns the status, the body and the headers of an answer."""
        gcs, bucket = self.gcs, match and match[1]
        if path.startswith("/session/"):
            return self._upload(path, body)
        if path.startswith("/upload"):
            if query["uploadType"] == "resumable":
                session = f"/session/{next(gcs.numbers)}"
                gcs.sessions[session] = name, bytearray()
                return 200, b"", {"Location": f"https://www.googleapis.com{session}"}
            about = gcs.put(name, body, query)
            return (412, b"", {}) if about is None else (200, about, {})
        if match and not match[2]:
            is_list = path.endswith("/o")
            return 200, gcs.list(str(bucket), query) if is_list else {"name": bucket}, {}
        if "/rewriteTo/" in path:
            to = re.search("/rewriteTo/b/([^/]+)/o/([^/]+)", path)
            assert to is not None
            target = f"{to[1]}/{urllib.parse.unquote(to[2])}"
            return 200, {"done": True, "resource": gcs.put(target, gcs.objects[name][0], {})}, {}
        if name not in gcs.objects:
            return 404, b"", {}
        content, generation = gcs.objects[name]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return 412, b"", {}
        if int(query.get("ifGenerationNotMatch", 0)) == generation:
            return 304, b"", {}
        if self.command == "DELETE":
            del gcs.objects[name]
            return 204, b"", {}
        if match and query.get("alt") != "media":
            return 200, gcs.about(name), {}
        headers = {"x_goog_generation": str(generation)}
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if first >= len(content):
                return 416, b"", {"Content_Range": f"bytes */{len(content)}"}
            last = min(last, len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers

    def _upload(self, path: str, body: bytes) -> tuple[int, bytes | dict | None, dict[str, str]]:
        """Takes the next part of a resumable upload; the object appears with the last byte."""
        if path not in self.gcs.sessions:
            return 404, b"", {}
        name, received = self.gcs.sessions[path]
        bounds = re.match(r"bytes (?:\*|(\d+)-\d+)/(\d+)", self.headers.get("Content-Range", ""))
        total = int(bounds[2]) if bounds else len(body)
        if body:
            first = int(bounds[1]) if bounds and bounds[1] else 0
            received[first:] = body
        if len(received) < total:
            return 308, b"", {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
        if name in self.gcs.objects and self.gcs.sessions[path][0] == "":
            return 404, b"", {}
        return 200, self.gcs.put(name, bytes(received), {}), {}


def _certificate(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a certificate of googleapis.com, signed by itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        " -subj /CN=googleapis.com -addext subjectAltName=DNS:googleapis.com,DNS:*.googleapis.com"
    )
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return certificate, key


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[tuple[FakeGcs, dict[str, str]]]:
    """Yields the fake and the environment variables with which clients find it."""
    certificate, key = _certificate(folder)
    gcs = FakeGcs()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    handler = type("Handler", (_Handler,), {"gcs": gcs, "tls": tls})
    httpd = server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_port}"
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": address,
        "HTTPS_PROXY": address,
        "https_proxy": address,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "CURL_CA_BUNDLE": str(certificate),
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "NO_GCE_CHECK": "true",
    }
    try:
        yield gcs, environment
    finally:
        httpd.shutdown()
        httpd.server_close()
