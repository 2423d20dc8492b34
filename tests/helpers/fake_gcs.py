"""An object store on this machine that speaks as much of Google's JSON API as gcsfs asks for.

It holds what matters to us as the real one does: an object is there whole or not, listings are
consistent, ``ifGenerationMatch=0`` lets one of many writers succeed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from bs_jax.records.stores import files

BUCKET = "bucket"
_PAGE = 20  # objects a page of a listing: few, so that there are several


class Store:
    """Objects of one bucket by key, and what was asked of them.

    Attributes:
        objects: key -> content.
        requests: "METHOD key" of each.
        refused: status and message to answer everything with, or None.
        gate: key whose next writer is kept waiting, and never written.
        at_gate: set when it is there; set `opened` to let it go.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.requests: list[str] = []
        self.refused: tuple[int, str] | None = None
        self.gate = ""
        self.at_gate, self.opened = threading.Event(), threading.Event()
        self.address = ""
        self.uploads: dict[str, tuple[str, bool, bytearray]] = {}
        self.lock = threading.Lock()
        self._count = 0

    @property
    def url(self) -> str:
        """Of the bucket."""
        return f"gs://{BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a command here, and to nobody's credentials."""
        return {"STORAGE_EMULATOR_HOST": self.address, "FSSPEC_GCS_TOKEN": "anon"}

    def put(self, key: str, content: bytes, *, create: bool = False) -> bool:
        """Write an object; False if it was to be created and is there."""
        with self.lock:
            if create and key in self.objects:
                return False
            self._count += 1
            self.objects[key], self.generations[key] = content, self._count
            return True

    def delete(self, key: str) -> bool:
        """Whether there was such an object."""
        with self.lock:
            return self.objects.pop(key, None) is not None

    def resource(self, key: str) -> dict[str, str]:
        """What the API tells of an object."""
        with self.lock:
            return self._resource(key)

    def matching(self, prefix: str) -> dict[str, dict[str, str]]:
        """What the API tells of all objects with a prefix, at one moment, in order."""
        with self.lock:
            return {
                key: self._resource(key) for key in sorted(self.objects) if key.startswith(prefix)
            }

    def _resource(self, key: str) -> dict[str, str]:
        content, generation = self.objects[key], self.generations[key]
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": BUCKET,
            "size": str(len(content)),
            "generation": str(generation),
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        _, found, rest = url.path.partition("/b/")
        bucket, _, key = rest.partition("/o")
        key = unquote(key.removeprefix("/"))
        self.store.requests.append(f"{self.command} {key or query.get('prefix', '')}")
        if self.store.refused is not None:
            self._fail(*self.store.refused)
        elif not found or unquote(bucket) != BUCKET:
            self._fail(404, "The specified bucket does not exist.")
        elif url.path.startswith("/upload/"):
            self._upload(query, body)
        elif "/rewriteTo/" in key or "/copyTo/" in key:
            source, _, target = key.replace("/copyTo/", "/rewriteTo/").partition("/rewriteTo/")
            self._copy(source, unquote(target.partition("/o/")[2]))
        elif key and key not in self.store.objects:
            self._fail(404, f"No such object: {BUCKET}/{key}")
        elif self.command == "DELETE":
            self.store.delete(key)
            self._answer(204, b"")
        elif key and query.get("alt") == "media":
            self._media(self.store.objects[key])
        elif key:
            self._json(self.store.resource(key))
        elif rest.partition("/o")[1]:
            self._list(query)
        else:
            self._json({"kind": "storage#bucket", "name": BUCKET})

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        create = query.get("ifGenerationMatch") == "0"
        if query["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
            _, told, content = body.split(b"--" + boundary, 2)
            content = content.partition(b"\n\n")[2].rpartition(b"\n--" + boundary)[0]
            self._put(json.loads(told.partition(b"\n\n")[2])["name"], content, create)
        elif "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            identity = hashlib.sha256(os.urandom(8)).hexdigest()
            self.store.uploads[identity] = (name, create, bytearray())
            location = f"{self.store.address}/upload/storage/v1/b/{BUCKET}/o"
            location += f"?uploadType=resumable&upload_id={identity}"
            self._answer(200, b"", Location=location)
        else:
            name, create, content = self.store.uploads[query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith(f"/{len(content)}"):
                self._put(name, bytes(content), create)
            else:
                self._answer(308, b"", Range=f"bytes=0-{len(content) - 1}")

    def _put(self, name: str, content: bytes, create: bool) -> None:
        if name == self.store.gate:
            self.store.gate = ""
            self.store.at_gate.set()
            self.store.opened.wait(60)
            self.close_connection = True
        elif self.store.put(name, content, create=create):
            self._json(self.store.resource(name))
        else:
            self._fail(412, "At least one of the pre-conditions you specified did not hold.")

    def _copy(self, source: str, target: str) -> None:
        if source not in self.store.objects:
            self._fail(404, f"No such object: {BUCKET}/{source}")
            return
        self.store.put(target, self.store.objects[source])
        self._json({"done": True, "resource": self.store.resource(target)})

    def _media(self, content: bytes) -> None:
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(content)
            self._answer(206, content[int(first) : end])
        else:
            self._answer(200, content)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        objects = self.store.matching(prefix)
        found: dict[str, bool] = {}  # name -> whether it is a prefix
        for key in objects:
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            found[prefix + head + cut if cut else key] = bool(cut)
        names = [name for name in sorted(found) if name > query.get("pageToken", "")]
        page = names[:_PAGE]
        answer: dict[str, object] = {"kind": "storage#objects"}
        answer["items"] = [objects[name] for name in page if not found[name]]
        answer["prefixes"] = [name for name in page if found[name]]
        if len(names) > len(page):
            answer["nextPageToken"] = page[-1]
        self._json(answer)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode())

    def _fail(self, status: int, message: str) -> None:
        error = {"error": {"code": status, "message": message, "errors": [{"message": message}]}}
        self._answer(status, json.dumps(error).encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """An empty store, served by a thread until the end."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})(
        ("127.0.0.1", 0), handler
    )
    server.daemon_threads = True
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store that this process's ``gs://`` paths lead to; skips the test without gcsfs."""
    fsspec, gcsfs = pytest.importorskip("fsspec"), pytest.importorskip("gcsfs")
    with serving() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        # What the variable does where the library is imported after it is set.
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        files.driver.cache_clear()
        yield store
        gcsfs.core.GCSFileSystem.clear_instance_cache()
        files.driver.cache_clear()
