"""Opens the graphs of a bundle with ONNX Runtime: checked, and with one mapping of the weights.

What is checked is what is used: a graph is read once into memory, compared with its SHA-256 in the
manifest, searched for external data (`fedlora.device.wire`) and given to ONNX Runtime from those
bytes. base.onnx.data is opened once, hashed and mapped from that one handle, and its parts are
given to every session as initializers; sessions of one process share the mapping. A file that is
replaced afterwards, as an update does it, changes nothing for those who have it open. (One that is
cut short in place does: the system then ends the process. And a weight that only stands in a
constant expression is computed by ONNX Runtime while it loads, which reads the file in the bundle's
folder for it; exported graphs have none.)

In fast mode ONNX Runtime keeps copies of weights, laid out for its kernels ("prepacked"): a copy
for each session that uses them. `low_memory` computes from the mapping itself; but for the large
int8 matrices of a train graph. Products of integers would turn and lay them out anew at every step,
which takes a fifth of its time, and need the mapped ones no more once there are copies: those pages
are given back to the system.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data.text import load_tokenizer
from fedlora.device.manifest import (
    BASE_DATA,
    TOKENIZER,
    FileInfo,
    Manifest,
    factor_names,
    read_manifest,
)
from fedlora.device.wire import (
    ExternalWeight,
    external_weights,
    integer_factors,
    keeping_outputs,
    with_inputs,
)
from fedlora.errors import (
    ConfigError,
    DataError,
    DigestMismatchError,
    FormatError,
    MissingExtraError,
)

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError("serving a bundle on a device", "device") from error

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["OpenBundle", "one_line", "open_bundle", "ort", "run_graph"]

_FLOAT, _INT64 = "tensor(float)", "tensor(int64)"
# Bytes of an int8 matrix of which a copy is worth it in low-memory mode. A training step reads it
# both ways, so there are two copies for one that is given back; smaller ones would cost as much
# memory a byte and save less time.
LARGE = 1 << 19


class OpenBundle:
    """A bundle whose weights are mapped; its graphs are opened when they are asked for."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        base: _Base,
        threads: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.threads, self.low_memory = threads, low_memory
        self._base = base
        self._sessions: dict[str, tuple[frozenset[str] | None, ort.InferenceSession]] = {}
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    def session(self, name: str, outputs: Collection[str] | None = None) -> ort.InferenceSession:
        """Return the session of a graph, by its file's name: the same one every time.

        outputs: compute these only: ONNX Runtime runs the whole graph whichever of a session's
        outputs are asked for. None: all. The last choice is kept.

        Raises `ConfigError` for a graph that the bundle does not have, `DigestMismatchError` and
        `FormatError`.
        """
        if name not in self.manifest.graphs:
            raise ConfigError(
                f"{self.folder}: expected one of the graphs {', '.join(self.manifest.graphs)}, "
                f"found {name!r}; export the bundle with it"
            )
        with self._lock:
            wanted = None if outputs is None else frozenset(outputs)
            if name not in self._sessions or self._sessions[name][0] != wanted:
                self._sessions[name] = wanted, self._open(name, wanted)
            return self._sessions[name][1]

    def close(self, name: str) -> None:
        """Let go of a graph's session, and of its memory once nobody else holds it."""
        with self._lock:
            self._sessions.pop(name, None)

    def tokenizer(self) -> Tokenizer:
        """Return the bundle's tokenizer. Raises `ConfigError` where there is none."""
        with self._lock:
            if self._tokenizer is None:
                if TOKENIZER not in self.manifest.files:
                    raise ConfigError(
                        f"{self.folder}: this bundle has no {TOKENIZER}: give it numbers, not text"
                    )
                path = self.folder / TOKENIZER
                data = _read_checked(path, self.manifest.files[TOKENIZER])
                self._tokenizer = _parse_tokenizer(data, path)
            return self._tokenizer

    def _open(self, name: str, outputs: frozenset[str] | None) -> ort.InferenceSession:
        path = self.folder / name
        model = _read_checked(path, self.manifest.files[name])
        data = self._base.data
        weights = external_weights(
            model, location=BASE_DATA, num_bytes=data.nbytes, where=str(path)
        )
        values = {w.name: ort.OrtValue.ortvalue_from_numpy(w.view(data)) for w in weights}
        if outputs is not None:
            model = keeping_outputs(model, outputs, where=str(path))
        packed: tuple[ExternalWeight, ...] = ()
        defaults: frozenset[str] = frozenset()
        if self.low_memory and self.manifest.graphs[name].kind == "train":
            factors = integer_factors(model, where=str(path))
            packed = tuple(w for w in weights if w.name in factors and w.num_bytes >= LARGE)
        if packed:  # and nothing else: of what may be overridden no copy is made
            rest = [w for w in weights if w not in packed and len(w.shape) > 1]
            model = with_inputs(model, rest, where=str(path))
            defaults = frozenset(w.name for w in rest)
        options = _options(self.folder, self.threads, self.low_memory, bool(packed))
        try:
            for weight_name, value in values.items():
                options.add_initializer(weight_name, value)
            session = ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's own classes have no root but this one
            raise FormatError(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from None
        # ONNX Runtime keeps pointers only: what they point to must live as long as the session.
        session.fedlora_keeps = (self._base, values)
        try:
            _check_ends(session, self.manifest, name, str(path), outputs, defaults)
        except UnicodeDecodeError:  # ONNX Runtime takes any bytes for the name of an end or a size
            raise FormatError(
                f"{path}: a name in it is not text; export the bundle again"
            ) from None
        self._base.release(packed)
        return session


def open_bundle(
    folder: str | os.PathLike[str] | OpenBundle,
    *,
    threads: int | None = None,
    low_memory: bool = False,
    verify: bool = True,
) -> OpenBundle:
    """Open a bundle; one that is open already comes back as it is.

    threads: of one operator; None lets ONNX Runtime take one for each core. low_memory: no
    prepacked copies of weights, no memory arena and no memory plan; where a train graph multiplies
    integers, copies of its large matrices and an arena after all. verify: compare base.onnx.data
    with its SHA-256; False is for who has just done so. Graphs are always compared.

    Raises `FormatError` and `DigestMismatchError`.
    """
    if isinstance(folder, OpenBundle):
        return folder
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected a number >= 1 or None, found {threads}")
    folder = Path(folder)
    manifest = read_manifest(folder)
    base = _open_base(folder / BASE_DATA, manifest.files[BASE_DATA], verify)
    return OpenBundle(folder, manifest, base, threads, low_memory)


def run_graph(
    session: ort.InferenceSession, names: list[str] | None, feeds: Mapping[str, Any]
) -> list[Any]:
    """Run a session whose feeds are arrays or OrtValues; return arrays.

    Raises `DataError` with ONNX Runtime's own words in one line.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # as above
        raise DataError(f"inputs: ONNX Runtime cannot run the graph: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Return the text of another package's error as one short line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


class _Base:
    """The mapped bytes of a base.onnx.data; they stay while anyone has it."""

    def __init__(self, mapping: mmap.mmap | None) -> None:
        self._mapping = mapping
        self.data = np.frombuffer(mapping or b"", np.uint8)
        self.sha256: str | None = None  # once it was computed

    def release(self, weights: Iterable[ExternalWeight]) -> None:
        """Give the pages of weights back to the system; who reads them gets them from the file."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
            return
        for weight in weights:
            start = -(-weight.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = weight.offset + weight.num_bytes - start
            if length > 0:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, length)


_mapped: weakref.WeakValueDictionary[tuple[int, ...], _Base] = weakref.WeakValueDictionary()


def _open_base(path: Path, info: FileInfo, verify: bool) -> _Base:
    with _open_plain(path) as file:
        about = os.fstat(file.fileno())
        if about.st_size != info.num_bytes:
            raise _changed(path, info)
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        base = _mapped.get(key)
        if base is None:
            mapping = None  # an empty file cannot be mapped
            if about.st_size:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            base = _mapped[key] = _Base(mapping)
        if verify and base.sha256 is None:
            # Read, not taken from the mapping: its pages would all become this process's memory.
            base.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if verify and base.sha256 != info.sha256:
            raise _changed(path, info)
    return base


def _read_checked(path: Path, info: FileInfo) -> bytes:
    with _open_plain(path) as file:
        data = file.read(info.num_bytes + 1)
    if len(data) != info.num_bytes or hashlib.sha256(data).hexdigest() != info.sha256:
        raise _changed(path, info)
    return data


def _open_plain(path: Path) -> io.BufferedReader:
    """Open a plain file: a link could lead out of the bundle, a pipe would wait for ever."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        if path.is_symlink():  # said before the system says it in words of its own
            raise FormatError(f"{path}: expected a file of the bundle, found none or a link")
        handle = os.open(path, flags)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path}: expected a file of the bundle, found none or a link")
    return os.fdopen(handle, "rb")


def _changed(path: Path, info: FileInfo) -> DigestMismatchError:
    return DigestMismatchError(
        f"{path}: expected {info.num_bytes:,} bytes with SHA-256 {info.sha256[:12]}, found "
        "others; the bundle is damaged: export or install it again"
    )


def _parse_tokenizer(data: bytes, path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("reading text on a device", "device") from error
    try:
        return load_tokenizer(Tokenizer.from_str(data.decode("utf-8")))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise FormatError(f"{path}: expected a tokenizer: {one_line(error)}") from None


def _options(
    folder: Path, threads: int | None, low_memory: bool, packing: bool
) -> ort.SessionOptions:
    """packing: copies of all weights that are constants of the graph, low_memory or not."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions; 2 warns of every optional input
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Without it, a model from memory has its external files looked for in the working directory.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.resolve())
    )
    if low_memory:
        options.enable_mem_pattern = False
    if low_memory and packing:
        # Without an arena the heap behind the copies is given back and asked for again at every
        # step. Of the copies themselves an arena would set aside twice as much as they need.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    elif low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    return options


def _check_ends(
    session: ort.InferenceSession,
    manifest: Manifest,
    name: str,
    where: str,
    kept: frozenset[str] | None,
    added: frozenset[str],
) -> None:
    """Compare a graph's inputs and outputs with what the manifest's docstring says of its kind.

    added: optional inputs that it got here, its weights.
    """
    kind = manifest.graphs[name].kind
    data = _INT64 if manifest.input_dtype == "int64" else _FLOAT
    required: dict[str, str] = {"inputs": data}
    optional: dict[str, str] = {}
    results = {"logits"}
    if kind == "train":
        required["targets"] = _INT64
        results = {"loss"}
    for path in manifest.layers:
        for frozen in (False, True) if kind == "train" else (False,):
            optional |= dict.fromkeys(factor_names(path, frozen=frozen), _FLOAT)
        if kind == "train":
            results |= {f"{name[: -len('weight')]}grad" for name in factor_names(path)}
    if manifest.web:
        required, optional = required | optional, {}
    inputs = {value.name: value for value in session.get_inputs()}
    overridable = session.get_overridable_initializers()
    defaults = {value.name: value for value in overridable if value.name not in added}
    outputs = {value.name for value in session.get_outputs()}
    if kind == "decode":
        for found, word, ends in ((inputs, "past_key_values", required), (outputs, "present", {})):
            layers = sum(1 for end in found if end.startswith(f"{word}.")) // 2
            names = [f"{word}.{i}.{part}" for i in range(layers) for part in ("key", "value")]
            ends |= dict.fromkeys(names, _FLOAT)
            results |= set(names) if word == "present" else set()
    for expected, found, word in (
        (required, inputs, "inputs"),
        (optional, defaults, "optional inputs"),
    ):
        types = {end: value.type for end, value in found.items()}
        if types != expected:
            end = min(types.items() ^ expected.items())[0]
            raise FormatError(
                f"{where}: {word}: expected {end[:80]!r} to be {expected.get(end, 'none')}, found "
                f"{types.get(end, 'none')}; export the bundle again"
            )
    if kept is not None:
        results &= kept
    if outputs != results:
        raise FormatError(
            f"{where}: outputs: missing or unknown {min(outputs ^ results)[:80]!r}; export the "
            "bundle again"
        )
    for path, spec in manifest.layers.items():
        A, B = ((inputs | defaults)[end].shape for end in factor_names(path))
        if list(A[1:]) != list(spec.in_shape) or B[:1] != [spec.out_features] or len(B) != 2:
            raise FormatError(
                f"{where}: layer {path!r}: expected A (rank, {spec.in_shape}) and B "
                f"({spec.out_features}, rank), found {A} and {B}; export the bundle again"
            )
