"""The server of the page: only its table, with types and rules; and what it refuses to serve."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fedlora as fl
from fedlora.cli.main import app
from fedlora.data import load_data
from fedlora.device.manifest import FileInfo, GraphInfo, Manifest, sha256_of, write_manifest
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    DigestMismatchError,
    FormatError,
    UnknownNameError,
)
from fedlora.formats import load_adapter
from fedlora.formats.tensors import parse_tensors
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.web import RUNTIME, Bundle, make_site, server, stream_of
from tests.matching import raises

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "clients" / "web"
TEXT = Manifest(
    base="b" * 64,
    base_id="toy",
    task="next-token",
    layers={"up": LayerSpec("linear", (6,), 10)},
    lora=fl.LoraConfig(rank=2),
    graphs={"infer.onnx": GraphInfo("infer")},
    files={},
    outputs=30,
    web=True,
)
WATCH = replace(
    TEXT, task="classification", input_dtype="float32", input_shape=(6, 100), outputs=7,
    labels=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"),
)  # fmt: skip


def write(folder: Path, manifest: Manifest) -> Path:
    """Write a folder that is a bundle to whoever does not run it."""
    folder.mkdir()
    names = ["base.onnx.data", "infer.onnx"]
    names += ["tokenizer.json"] if manifest.task == "next-token" else []
    for name in names:
        (folder / name).write_bytes(name.encode())
    files = {p.name: FileInfo(sha256_of(p), p.stat().st_size) for p in folder.iterdir()}
    write_manifest(replace(manifest, files=files), folder)
    (folder / "notes.txt").write_text("not of the bundle", encoding="utf-8")
    return folder


class World:
    """A server of a text bundle with a global adapter, and of a watch bundle."""

    def __init__(self, folder: Path) -> None:
        self.text, self.watch = write(folder / "text", TEXT), write(folder / "watch", WATCH)
        self.adapter = initial_adapter(TEXT.layers, TEXT.lora, 0, TEXT.base)
        bundles = [Bundle(self.text, self.adapter), Bundle(self.watch)]
        self.site = make_site(bundles)
        self.seen: list[str] = []
        self.server = server(self.site, port=0, seen=self.seen.append)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}
        )

    def get(self, path: str, method: str = "GET", host: str | None = None) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True)  # as it stands, dots and all
        connection.putheader("Host", host or f"127.0.0.1:{self.port}")
        connection.endheaders()
        answer = connection.getresponse()
        answer.body = answer.read()  # type: ignore[attr-defined]
        connection.close()
        return answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("web"))
    world.thread.start()
    yield world
    world.server.shutdown()
    world.thread.join()
    world.server.server_close()


def test_all_named_files_come_with_their_type(world: World) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/watch.html": "text/html; charset=utf-8",
        "/style.css": "text/css; charset=utf-8",
        "/icon.svg": "image/svg+xml",
        "/sw.js": "text/javascript; charset=utf-8",
        "/js/worker.js": "text/javascript; charset=utf-8",
        "/vendor/ort.wasm.bundle.min.mjs": "text/javascript; charset=utf-8",
        "/vendor/ort-wasm-simd-threaded.wasm": "application/wasm",
        "/setup.json": "application/json",
        "/bundles/next-token/manifest.json": "application/json",
        "/bundles/next-token/infer.onnx": "application/octet-stream",
        "/bundles/next-token/global.safetensors": "application/octet-stream",
        "/bundles/classification/stream.safetensors": "application/octet-stream",
    }
    for path, kind in types.items():
        answer = world.get(path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind), path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        kept = "max-age=3600" if path == "/sw.js" else "no-cache"
        assert answer.headers["Cache-Control"] == kept
    wasm = world.get("/vendor/ort-wasm-simd-threaded.wasm")
    assert wasm.body == (PAGE / "vendor" / "ort-wasm-simd-threaded.wasm").read_bytes()  # type: ignore[attr-defined]
    head = world.get("/", "HEAD")
    assert head.headers["Content-Length"] == str((PAGE / "index.html").stat().st_size)
    assert head.body == b""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path",
    [
        "/js/", "/js", "/vendor", "/vendor/", "/vendor/README.md", "/vendor/SHA256SUMS",
        "/bundles/", "/bundles/next-token/", "/bundles/next-token/notes.txt", "/../pyproject.toml",
        "/js/../../../pyproject.toml", "/js/%2e%2e/%2e%2e/%2e%2e/pyproject.toml", "//etc/passwd",
        "/bundles/next-token/../../../../etc/passwd", "/index.html/", "/INDEX.HTML", "/.git/config",
        "/js/worker.js%00", "/js\\worker.js", "/__init__.py", "",
    ],
)  # fmt: skip
def test_nothing_but_the_named_files_is_answered(world: World, path: str) -> None:
    answer = world.get(path or "*")
    assert answer.status == 404
    assert answer.body == b"not found\n"  # type: ignore[attr-defined]


def test_a_page_may_connect_here_only_and_the_worker_nowhere(world: World) -> None:
    rules = {path: world.get(path).headers["Content-Security-Policy"] for path in world.site}
    for path in ("/", "/index.html", "/watch.html"):
        parts = dict(part.strip().split(" ", 1) for part in rules[path].split(";"))
        assert parts["default-src"] == "'none'"
        assert parts["connect-src"] == parts["worker-src"] == "'self'"
        assert parts["script-src"] == "'self' 'wasm-unsafe-eval'"
        assert parts["form-action"] == parts["base-uri"] == parts["frame-ancestors"] == "'none'"
    worker = dict(part.strip().split(" ", 1) for part in rules["/js/worker.js"].split(";"))
    assert worker == {"default-src": "'none'", "script-src": "'self' 'wasm-unsafe-eval'"}
    assert all(rule.startswith("default-src 'none'") for rule in rules.values())
    # The page says so itself too, for whoever serves it with another server.
    for name in ("index.html", "watch.html"):
        text = (PAGE / name).read_text(encoding="utf-8")
        assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'; script' in text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text


def test_another_site_s_name_for_this_address_is_not_answered(world: World) -> None:
    for host in ("127.0.0.1", "localhost:1", "[::1]:8080"):
        assert world.get("/", host=host).status == 200
    for host in ("rebound.example", "rebound.example:80", "127.0.0.1.rebound.example", "["):
        assert world.get("/", host=host).status == 421


def test_a_browser_that_goes_away_is_no_error(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """The largest file is asked for and the connection is torn after its first bytes."""
    gone = socket.create_connection(("127.0.0.1", world.port))
    path = "/vendor/ort-wasm-simd-threaded.wasm"
    gone.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert gone.recv(12) == b"HTTP/1.1 200"
    before = set(threading.enumerate())
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    gone.close()
    for thread in before - {threading.current_thread(), world.thread}:
        thread.join(timeout=30)
    assert capfd.readouterr().err == ""


def test_another_version_of_ip_is_an_address_too(world: World) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server(world.site, "::1", 0) as found:
        assert found.server_address[0] == "::1"


def test_only_get_and_head_are_understood(world: World) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert world.get("/", method).status == 501


def test_the_global_adapter_is_served_as_float32(world: World, tmp_path: Path) -> None:
    body = world.get("/bundles/next-token/global.safetensors").body  # type: ignore[attr-defined]
    (tmp_path / "global.safetensors").write_bytes(body)
    found = load_adapter(tmp_path / "global.safetensors")
    assert found.fingerprint() == world.adapter.fingerprint()
    assert json.loads(world.get("/setup.json").body) == {  # type: ignore[attr-defined]
        "bundles": {
            "next-token": {"global": True, "stream": False},
            "classification": {"global": False, "stream": True},
        }
    }


def test_every_request_is_told(world: World) -> None:
    world.seen.clear()
    world.get("/setup.json?x=1")
    world.get("/nowhere")
    assert world.seen == ["/setup.json", "/nowhere"]


def test_a_stream_has_one_person_s_windows() -> None:
    file = parse_tensors(stream_of(WATCH, "2_left"))
    person = load_data("watch").client("2_left")
    np.testing.assert_array_equal(file.array("test_inputs"), person.test.inputs)
    np.testing.assert_array_equal(file.array("train_targets"), person.train.targets)
    about = json.loads(file.metadata["about"])
    assert (about["client"], about["labels"][5]) == ("2_left", "trapezius extension")
    with raises(UnknownNameError, "9_left"):
        stream_of(WATCH, "9_left")
    with raises(ConfigError, "expected a bundle of inputs (6, 100)", "found (6, 50)"):
        stream_of(replace(WATCH, input_shape=(6, 50)))


def test_a_bundle_that_no_browser_runs_is_refused_with_the_line_that_makes_one(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "plain", replace(TEXT, web=False))
    with raises(ConfigError, "fedlora export toy --web --train 8x32 --decode --out DIR"):
        make_site([Bundle(folder)])


def test_a_wheel_without_the_runtime_says_what_to_do(world: World, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    with raises(ConfigError, "npm pack onnxruntime-web@1.30.0", "--runtime package/dist"):
        make_site([Bundle(world.text)], runtime=tmp_path / "dist")
    for name in RUNTIME:
        (tmp_path / "dist" / name).write_bytes(b"another")
    with raises(DigestMismatchError, "expected SHA-256 3398c10d07d2 of onnxruntime-web 1.30.0"):
        make_site([Bundle(world.text)], runtime=tmp_path / "dist")
    with raises(ConfigError, "expected the page, found none"):
        make_site([Bundle(world.text)], page=tmp_path)


def test_what_does_not_go_together_is_refused(world: World, tmp_path: Path) -> None:
    with raises(ConfigError, "at least one bundle"):
        make_site([])
    with raises(ConfigError, "expected one bundle for next-token, not two"):
        make_site([Bundle(world.text), Bundle(world.text)])
    other = initial_adapter(TEXT.layers, TEXT.lora, 0, "c" * 64)
    with raises(BaseMismatchError, "expected an adapter of the bundle's base"):
        make_site([Bundle(world.text, other)])
    damaged = write(tmp_path / "damaged", TEXT)
    (damaged / "infer.onnx").write_bytes(b"infer.onnY")
    with raises(DigestMismatchError, "infer.onnx"):
        make_site([Bundle(damaged)])
    (damaged / "infer.onnx").unlink()
    (damaged / "infer.onnx").symlink_to("/etc/passwd")
    with raises(FormatError, "found none or a link"):
        make_site([Bundle(damaged)])
    with raises(ConfigError, "cannot be served", "--port"):
        server(world.site, port=world.port)


def test_only_the_watch_s_bundle_opens_the_watch(world: World) -> None:
    assert make_site([Bundle(world.watch)])["/"].source == PAGE / "watch.html"


def test_the_runtime_is_what_its_digests_say() -> None:
    lines = (PAGE / "vendor" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    stated = dict(reversed(line.split("  ")) for line in lines)
    for name, digest in stated.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
    assert RUNTIME.items() <= stated.items()
    assert "Permission is hereby granted" in (PAGE / "vendor" / "LICENSE").read_text("utf-8")


def test_the_service_worker_keeps_every_file_of_the_page() -> None:
    text = (PAGE / "sw.js").read_text(encoding="utf-8")
    names = {path.stem for path in (PAGE / "js").glob("*.js")}
    listed = set(
        text.partition("...[")[2].partition("]")[0].replace('"', " ").replace(",", " ").split()
    )
    assert listed == names


def test_the_wheel_has_the_page_without_the_runtime() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    forced = table["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    ours = {name for name in forced if name.startswith("clients/")}
    there = {f"clients/{path.name}" for path in (ROOT / "clients").glob("*.py")}
    there |= {f"clients/web/{path.name}" for path in PAGE.iterdir() if path.name != "vendor"}
    assert ours == there
    assert all(target == f"fedlora/_app/{name}" for name, target in forced.items() if name in ours)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["web", "--bundle", str(tmp_path)])
    assert isinstance(result.exception, FormatError)
    assert "make one with fedlora export" in str(result.exception)
    result = CliRunner().invoke(app, ["web", *["--bundle", str(tmp_path)] * 3])
    assert "expected one or two, found 3" in str(result.exception)
