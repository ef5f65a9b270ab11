"""What a device bundle is: the files of the folder, and the names in its graphs.

    bundle/
      manifest.json      what is here; the SHA-256 of every other file
      base.onnx.data     the weights of the base, once, for all graphs
      infer.onnx         inputs → logits
      decode.onnx        language models: the next token's logits, with a cache
      train_8x32.onnx    8 rows of 32 tokens; train_16.onnx: 16 rows of a fixed shape
      tokenizer.json     text only
      canaries.safetensors  a few inputs and the base's logits; see `fedlora.device.canaries`

A graph's inputs are named by this module. LoRA factors are inputs of every graph, float32 and of
any rank, with the scaling folded into B, so that one graph serves the base and every adapter:

    PATH.lora_A.weight   (rank, *in_shape)     PATH.lora_B.weight   (out_features, rank)

They have zero defaults of rank 1, which are the base itself; in a web bundle (`Manifest.web`) they
have none and must be fed. Train graphs take a second, frozen adapter in the same way, as
``PATH.frozen_A.weight`` and ``PATH.frozen_B.weight``.

    infer    inputs (batch, time) int64 or (batch, *shape) float32
             → logits (batch, time, vocabulary) or (batch, classes)
    decode   inputs (batch, time) int64, past_key_values.I.key and .value
             (batch, heads, past, size) of each layer I, with past >= 0
             → logits (batch, vocabulary) of the last position, present.I.key and .value
    train    inputs (rows, time) or (rows, *shape), targets (rows, time) or (rows,) int64,
             -100 where not counted
             → loss (), the mean over the counted targets, and its gradients
             PATH.lora_A.grad and PATH.lora_B.grad, shaped as the factors (B's folded)

A train graph is the forward and backward pass of one step. The optimizer is not in it: factors are
few, NumPy steps them in no time, and so one graph trains any rank by any rule with any optimizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from fedlora.adapter import Adapter, Array, LoraConfig
from fedlora.errors import DigestMismatchError, FormatError
from fedlora.files import write_atomic
from fedlora.formats.packed import config_from_json, config_to_json
from fedlora.formats.strict_json import is_digest, is_text, parse_json, pretty_json, shown
from fedlora.targets import LayerSpec

__all__ = [
    "BASE_DATA",
    "CANARIES",
    "MANIFEST",
    "TOKENIZER",
    "FileInfo",
    "GraphInfo",
    "Manifest",
    "Precision",
    "TrainPrecision",
    "factor_names",
    "factors_of",
    "read_manifest",
    "sha256_of",
    "verify_files",
    "write_manifest",
    "zero_factors",
]

VERSION = 1
MANIFEST, BASE_DATA, TOKENIZER = "manifest.json", "base.onnx.data", "tokenizer.json"
CANARIES = "canaries.safetensors"
GraphKind = Literal["infer", "decode", "train"]
Precision = Literal["fp32", "int8", "int4"]
# Of the products of training: "exact" gives the gradients of the base as it is stored; the others
# approximate them, in the backward pass alone or in both.
TrainPrecision = Literal["exact", "int8-backward", "int8"]
_GRAPH_FILE = re.compile(r"infer\.onnx|decode\.onnx|train_\d+(x\d+)?\.onnx")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a bundle."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """One graph of a bundle; rows and positions are a train graph's fixed size."""

    kind: GraphKind
    rows: int | None = None
    positions: int | None = None  # tokens of a row; None: inputs of a fixed shape
    difference: float = 0.0  # the largest that the exporter measured against torch


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says about itself.

    base: fingerprint of the base that it was exported from, before any quantization.
    layers: the layers whose factors the graphs take.
    lora: how an adapter for it starts, unless one is given.
    input_shape: of one example: () for token ids, whose length is free, else the features'.
    precision: how the base's weights are stored. train_precision: whether train graphs give exact
    gradients of that base, or approximate ones with integer products.
    merged: fingerprint of an adapter that is in the weights; None: the base's own weights.
    """

    base: str
    base_id: str
    task: Literal["next-token", "classification"]
    layers: Mapping[str, LayerSpec]
    lora: LoraConfig
    graphs: Mapping[str, GraphInfo]  # by file name
    files: Mapping[str, FileInfo]  # by file name, without the manifest itself
    input_dtype: Literal["int64", "float32"] = "int64"
    input_shape: tuple[int, ...] = ()
    outputs: int = 0  # size of the last axis of the logits
    labels: tuple[str, ...] | None = None
    precision: Precision = "fp32"
    train_precision: TrainPrecision = "exact"
    web: bool = False
    merged: str | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)  # versions of what exported it

    def __post_init__(self) -> None:
        for name in ("layers", "graphs", "files", "made_by"):
            value = dict(sorted(getattr(self, name).items()))
            object.__setattr__(self, name, MappingProxyType(value))

    @property
    def precisions(self) -> str:
        """How the base is stored, and that training is approximate where it is: for people."""
        if self.train_precision == "exact":
            return self.precision
        return f"{self.precision}, approximate training ({self.train_precision})"

    def graph_of(self, kind: GraphKind) -> str | None:
        """Return the file of the only graph of this kind, None where there is none."""
        return next((name for name, graph in self.graphs.items() if graph.kind == kind), None)

    def buckets(self) -> tuple[tuple[str, GraphInfo], ...]:
        """Return the train graphs, the shortest rows first, then the fewest."""
        found = [item for item in self.graphs.items() if item[1].kind == "train"]
        return tuple(sorted(found, key=lambda item: (item[1].positions or 0, item[1].rows or 0)))


def factor_names(path: str, *, frozen: bool = False) -> tuple[str, str]:
    """Return the names of a layer's A and B among a graph's inputs.

    >>> factor_names("model.layers.0.q_proj")
    ('model.layers.0.q_proj.lora_A.weight', 'model.layers.0.q_proj.lora_B.weight')
    """
    word = "frozen" if frozen else "lora"
    return f"{path}.{word}_A.weight", f"{path}.{word}_B.weight"


def factors_of(adapter: Adapter, *, frozen: bool = False) -> Iterator[tuple[str, Array]]:
    """Yield (input name, contiguous float32 factor) of an adapter, its scalings folded into B."""
    for path, layer in adapter.layers.items():
        name_A, name_B = factor_names(path, frozen=frozen)
        yield name_A, np.ascontiguousarray(layer.A)
        yield name_B, np.ascontiguousarray(layer.B * np.float32(layer.scaling))


def zero_factors(manifest: Manifest, *, frozen: bool = False) -> Iterator[tuple[str, Array]]:
    """Yield (input name, zeros of rank 1): the base, for graphs that have no defaults."""
    for path, spec in manifest.layers.items():
        name_A, name_B = factor_names(path, frozen=frozen)
        yield name_A, np.zeros((1, *spec.in_shape), np.float32)
        yield name_B, np.zeros((spec.out_features, 1), np.float32)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json, atomically and with the same bytes for the same manifest."""
    record = {
        "version": VERSION,
        "base": manifest.base,
        "base_id": manifest.base_id,
        "task": manifest.task,
        "layers": {path: asdict(spec) for path, spec in manifest.layers.items()},
        "lora": config_to_json(manifest.lora),
        "graphs": {name: asdict(graph) for name, graph in manifest.graphs.items()},
        "files": {name: asdict(info) for name, info in manifest.files.items()},
        "input_dtype": manifest.input_dtype,
        "input_shape": list(manifest.input_shape),
        "outputs": manifest.outputs,
        "labels": None if manifest.labels is None else list(manifest.labels),
        "precision": manifest.precision,
        "train_precision": manifest.train_precision,
        "web": manifest.web,
        "merged": manifest.merged,
        "made_by": dict(manifest.made_by),
    }
    write_atomic(folder / MANIFEST, pretty_json(record))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; the other files are `verify_files`'s.

    Raises `FormatError` on anything that `write_manifest` does not write.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(
            f"{folder}: expected a bundle with {MANIFEST}, found none; make one with fedlora export"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    record = parse_json(data, str(path))
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise FormatError(f"{path}: expected the manifest of a bundle of version {VERSION}")
    record = {key: value for key, value in record.items() if key != "version"}
    known = set(Manifest.__dataclass_fields__)
    if record.keys() != known:
        name = min(record.keys() ^ known)
        raise FormatError(f"{path}: missing or unknown key {name[:80]!r}")
    for key, (expected, fits) in _FIELDS.items():
        if not fits(record[key]):
            raise FormatError(f"{path}: {key}: expected {expected}, found {shown(record[key])}")
    try:
        layers = {name: _spec(about) for name, about in record["layers"].items()}
        graphs = {name: GraphInfo(**about) for name, about in record["graphs"].items()}
        files = {name: FileInfo(**about) for name, about in record["files"].items()}
    except KeyError as error:
        raise FormatError(f"{path}: layers: expected the key {error}, found none") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {error}") from None
    lora = config_from_json(record["lora"], list(layers), str(path))
    record |= {
        "layers": layers, "graphs": graphs, "files": files, "lora": lora,
        "input_shape": tuple(record["input_shape"]),
        "labels": None if record["labels"] is None else tuple(record["labels"]),
    }  # fmt: skip
    manifest = Manifest(**record)
    _check_files(manifest, path)
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its size and digest in the manifest.

    Raises `DigestMismatchError`, and `FormatError` for a missing file or one that is a link: it
    could lead out of the bundle.
    """
    for name, info in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise FormatError(f"{path}: expected a file of the bundle, found none or a link")
        if path.stat().st_size != info.num_bytes or sha256_of(path) != info.sha256:
            raise DigestMismatchError(
                f"{path}: expected {info.num_bytes:,} bytes with SHA-256 {info.sha256[:12]}, found "
                "others; the bundle is damaged: export or install it again"
            )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _spec(value: Mapping[str, Any]) -> LayerSpec:
    fields = dict(value)
    shape = tuple(fields.pop("in_shape"))
    numbers = (*shape, fields["out_features"])
    if fields["kind"] not in ("linear", "conv", "embedding") or not shape:
        raise ValueError(f"expected a layer, found {shown(value)}")
    if not all(type(size) is int and 0 < size < 1 << 31 for size in numbers):
        raise ValueError(f"expected sizes of a layer, found {shown(value)}")
    return LayerSpec(in_shape=shape, **fields)


def _check_files(manifest: Manifest, path: Path) -> None:
    for name, graph in manifest.graphs.items():
        if not _GRAPH_FILE.fullmatch(name) or name not in manifest.files:
            raise FormatError(f"{path}: graphs: expected one of the bundle, found {name[:80]!r}")
        sizes = [size for size in (graph.rows, graph.positions) if size is not None]
        if graph.kind not in get_args(GraphKind) or not all(
            type(size) is int and 0 < size < 1 << 31 for size in sizes
        ):
            raise FormatError(f"{path}: {name}: expected a kind and sizes, found {shown(graph)}")
        if type(graph.difference) not in (float, int):
            raise FormatError(
                f"{path}: {name}: expected a difference to torch, found {shown(graph.difference)}"
            )
        if graph.kind == "train" and graph.rows is None:
            raise FormatError(f"{path}: {name}: expected the rows of a train graph, found none")
    for name, info in manifest.files.items():
        if name not in manifest.graphs and name not in (BASE_DATA, TOKENIZER, CANARIES):
            raise FormatError(f"{path}: files: a bundle has no file {name[:80]!r}")
        if type(info.num_bytes) is not int or info.num_bytes < 0:
            raise FormatError(f"{path}: {name}: expected its size, found {shown(info.num_bytes)}")
        if not is_digest(info.sha256):
            raise FormatError(f"{path}: {name}: expected its SHA-256, found {shown(info.sha256)}")
    if BASE_DATA not in manifest.files or not manifest.graphs:
        raise FormatError(f"{path}: expected {BASE_DATA} and at least one graph, found none")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(is_text(one) for one in value)


_FIELDS: dict[str, tuple[str, Any]] = {
    "base": ("a fingerprint", is_text),
    "base_id": ("a name", is_text),
    "task": ("next-token or classification", lambda v: v in ("next-token", "classification")),
    "layers": ("an object with at least one layer", lambda v: isinstance(v, dict) and bool(v)),
    "lora": ("an object", lambda v: isinstance(v, dict)),
    "graphs": ("an object", lambda v: isinstance(v, dict)),
    "files": ("an object", lambda v: isinstance(v, dict)),
    "input_dtype": ("int64 or float32", lambda v: v in ("int64", "float32")),
    "input_shape": (
        "a list of sizes",
        lambda v: isinstance(v, list) and all(type(n) is int and 0 < n < 1 << 31 for n in v),
    ),
    "outputs": ("a whole number >= 1", lambda v: type(v) is int and 0 < v < 1 << 31),
    "labels": ("a list of texts or null", lambda v: v is None or _is_texts(v)),
    "precision": ("fp32, int8 or int4", lambda v: v in get_args(Precision)),
    "train_precision": (
        "exact, int8-backward or int8",
        lambda v: v in get_args(TrainPrecision),
    ),
    "web": ("true or false", lambda v: isinstance(v, bool)),
    "merged": ("a fingerprint or null", lambda v: v is None or is_text(v)),
    "made_by": (
        "an object of texts",
        lambda v: isinstance(v, dict) and all(is_text(x) for x in v.values()),
    ),
}
