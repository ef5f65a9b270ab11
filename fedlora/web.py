"""The page of clients/web on this machine: a server of a few named files, and of nothing else.

What is served is a table that is made once: path → bytes or file, type, and the rules by which a
browser treats it. There are no folders to list and no names to try: any other path is answered with
404. The page computes everything itself; the server sees which files it loads, and then nothing.

A page may connect to this server only while it loads (`PAGE_RULES`), and shuts that door itself
afterwards; the worker in which messages are read and learnt may never connect (`WORKER_RULES`).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedlora.adapter import Adapter
from fedlora.data import load_data
from fedlora.device.fit import check_adapter
from fedlora.device.manifest import MANIFEST, Manifest, read_manifest, sha256_of, verify_files
from fedlora.errors import ConfigError, DigestMismatchError
from fedlora.experiment import app_root
from fedlora.formats.packed import encode_packed
from fedlora.formats.strict_json import canonical_json
from fedlora.formats.tensors import dump_tensors

__all__ = ["RUNTIME", "Bundle", "File", "Site", "make_site", "server", "stream_of"]

# onnxruntime-web 1.30.0, as clients/web/vendor/SHA256SUMS has them.
RUNTIME = {
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
}
PAGE_RULES = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
WORKER_RULES = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'"
CACHE_RULES = "default-src 'none'; connect-src 'self'; script-src 'self'"  # of the service worker
# A browser looks for a new service worker whenever it likes. For an hour it need not ask for it, so
# that a page which is loaded sends nothing at all.
WORKER_KEPT = "max-age=3600"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
BYTES = "application/octet-stream"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}  # not by `mimetypes`, which asks the machine's own tables
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EXERCISES = {
    "ABD": "abduction", "ER": "external rotation", "FEL": "forward elevation",
    "IR": "internal rotation", "PEN": "pendulum", "ROW": "upright row",
    "TRAP": "trapezius extension",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class File:
    """What one path is answered with."""

    source: Path | bytes
    type: str
    rules: str = "default-src 'none'"  # its Content-Security-Policy
    cache: str = "no-cache"

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle of `fedlora export --web`, and what goes with it.

    adapter: served as the global one. client: whose sensor stream is replayed; classifiers only.
    """

    folder: Path
    adapter: Adapter | None = None
    client: str | None = None


Site = Mapping[str, File]  # by path, which begins with "/"


def make_site(
    bundles: Iterable[Bundle], *, page: Path | None = None, runtime: Path | None = None
) -> Site:
    """Return what is served for some bundles, at most one a task.

    page: the folder clients/web; runtime: that of onnxruntime-web's files, its vendor/ by default.
    Every file of a bundle and of the runtime is compared with its digest.

    Raises `ConfigError` for a bundle that no browser runs, two of one task, or a missing page or
    runtime; and what reading a bundle, an adapter and the data raise.
    """
    page = page or app_root() / "clients" / "web"
    site = _page_files(page) | _runtime_files(runtime or page / "vendor")
    setup: dict[str, Any] = {}
    for bundle in bundles:
        manifest = _browser_manifest(bundle.folder)
        if manifest.task in setup:
            raise ConfigError(f"{bundle.folder}: expected one bundle for {manifest.task}, not two")
        where = f"/bundles/{manifest.task}"
        for name in (MANIFEST, *manifest.files):
            kind = TYPES.get(Path(name).suffix, BYTES)
            site[f"{where}/{name}"] = File(bundle.folder / name, kind)
        if bundle.adapter is not None:
            check_adapter(bundle.adapter, manifest)
            site[f"{where}/global.safetensors"] = File(encode_packed(bundle.adapter), BYTES)
        stream = None
        if manifest.task == "classification" and manifest.input_shape:
            stream = stream_of(manifest, bundle.client)
            site[f"{where}/stream.safetensors"] = File(stream, BYTES)
        setup[manifest.task] = {
            "global": bundle.adapter is not None,
            "stream": stream is not None,
        }
    if not setup:
        raise ConfigError("expected at least one bundle, found none")
    site["/setup.json"] = File(canonical_json({"bundles": setup}), TYPES[".json"])
    # Where there is only the watch's bundle, its page is the first one.
    first = "/index.html" if "next-token" in setup else "/watch.html"
    site["/"] = site[first]
    return MappingProxyType(site)


def server(
    site: Site,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    seen: Callable[[str], None] | None = None,
) -> ThreadingHTTPServer:
    """Return a server of `site`; port 0 takes a free one. `seen` is told every path asked for.

    Raises `ConfigError` when the address cannot be had.
    """

    class Handler(_Handler):
        pass

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    Handler.site, Handler.seen = site, staticmethod(seen or (lambda path: None))
    Handler.hosts = LOOPBACK if host in LOOPBACK else frozenset()
    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot be served: {error.strerror or error}; take another --port"
        ) from None


def stream_of(manifest: Manifest, client: str | None = None) -> bytes:
    """Return one person's windows of the watch data as safetensors, for the page to replay.

    Tensors: train_inputs and test_inputs (n, *shape) float32, train_targets and test_targets (n,)
    uint8; metadata "about": JSON with the client and the classes' names. Raises `ConfigError` for a
    bundle of other inputs, and `UnknownNameError`.
    """
    data = load_data("watch")
    chosen = data.client(client or data.client_ids[0])
    shape = chosen.test.inputs.shape[1:]
    if manifest.input_shape != shape:
        raise ConfigError(
            f"the watch page: expected a bundle of inputs {shape}, as watch-cnn has, found "
            f"{manifest.input_shape}"
        )
    labels = manifest.labels or tuple(map(str, range(manifest.outputs)))
    names = [EXERCISES.get(label, label) for label in labels]
    about = canonical_json({"client": chosen.client_id, "labels": names}).decode()
    tensors: dict[str, Any] = {}
    for part, examples in (("train", chosen.train), ("test", chosen.test)):
        tensors[f"{part}_inputs"] = examples.inputs
        tensors[f"{part}_targets"] = examples.targets.astype(np.uint8)
    return dump_tensors(tensors, {"about": about})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # seconds that a connection may be idle
    site: Site
    seen: Callable[[str], None]
    hosts: frozenset[str] | set[str]  # that may be asked for; none: any

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def version_string(self) -> str:
        return "fedlora"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; `seen` is told."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.seen(path)
        file = self.site.get(path)
        # Another site's name that was made to point here (DNS rebinding) is not answered.
        host = self.headers.get("Host", "").rpartition("]")[0].lstrip("[")
        host = host or self.headers.get("Host", "").partition(":")[0]
        if self.hosts and host not in self.hosts:
            self._send(File(b"", BYTES), 421, b"", with_body)
            return
        try:
            body = None if file is None else file.read()
        except OSError:  # taken away since
            body = None
        if file is None or body is None:
            self._send(File(b"", TYPES[".html"]), 404, b"not found\n", with_body)
        else:
            self._send(file, 200, body, with_body)

    def _send(self, file: File, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        headers = {
            **HEADERS,
            "Cache-Control": file.cache,
            "Content-Type": file.type,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": file.rules,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _page_files(page: Path) -> dict[str, File]:
    names = ["index.html", "watch.html", "style.css", "icon.svg", "sw.js"]
    names += sorted(f"js/{path.name}" for path in (page / "js").glob("*.js"))
    rules = {"sw.js": CACHE_RULES, "js/worker.js": WORKER_RULES}
    site = {}
    for name in names:
        path = page / name
        if not path.is_file():
            raise ConfigError(
                f"{path}: expected the page, found none; install fedlora again, or run it from a "
                "checkout of its repository"
            )
        own = PAGE_RULES if path.suffix == ".html" else rules.get(name, "default-src 'none'")
        kept = WORKER_KEPT if name == "sw.js" else "no-cache"
        site[f"/{name}"] = File(path, TYPES[path.suffix], own, kept)
    return site


def _runtime_files(folder: Path) -> dict[str, File]:
    site = {}
    for name, digest in RUNTIME.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(
                f"{path}: expected ONNX Runtime for browsers, which the wheel leaves out (14 MB); "
                "run npm pack onnxruntime-web@1.30.0, unpack it, and give --runtime package/dist; "
                "or run fedlora from a checkout of its repository"
            )
        if sha256_of(path) != digest:
            raise DigestMismatchError(
                f"{path}: expected SHA-256 {digest[:12]} of onnxruntime-web 1.30.0, found another "
                "file; take that version"
            )
        site[f"/vendor/{name}"] = File(path, TYPES[path.suffix])
    return site


def _browser_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.web:
        how = "--train 8x32 --decode" if manifest.task == "next-token" else "--train 16"
        raise ConfigError(
            f"{folder}: expected a bundle for browsers, found one whose factors are optional "
            f"inputs; make one with fedlora export {manifest.base_id} --web {how} --out DIR"
        )
    verify_files(folder, manifest)
    return manifest
