"""Small bundles written by hand, for tests of what runs on a device: exact, and without torch.

`write_classifier`: two linear layers, ReLU between them. `write_language_model`: one attention
layer of two heads (with a bias that grows with distance, so that positions count) and a head that
is tied to the embedding. Forward and backward are spelt out node by node. Each comes back with its
weights, from which `classifier_logits` and `language_logits` compute the same in plain NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import fedlora as fl
from fedlora.adapter import Adapter, Array
from fedlora.device.manifest import (
    FileInfo,
    GraphInfo,
    Manifest,
    factor_names,
    sha256_of,
    write_manifest,
)
from fedlora.export.weights import BaseWeights
from fedlora.targets import LayerSpec

FEATURES, HIDDEN, CLASSES = 6, 8, 3
WIDTH, HEADS, SIZE = 16, 2, 8
SLOPES = np.array([0.5, 0.125], np.float32)  # of each head: how fast attention fades by distance
ATTENTION = "model.layers.0.attention"
MASKED = np.float32(-1e9)

LETTERS = "abcdefghijklmnopqrstuvwxyz.,!'"
MERGES = [
    "t h", "th e", "Ġ the", "Ġ a", "a t", "Ġ c", "Ġc at", "i n", "Ġ in", "Ġ s", "Ġs at", "o n",
    "Ġ on", "Ġ m", "Ġm at", "in g", "e r", "Ġ t", "Ġt o", "Ġ h", "o m", "Ġh om", "Ġhom e",
]  # fmt: skip


@dataclass(frozen=True)
class HandMade:
    """A bundle that was written, and what is in it."""

    folder: Path
    manifest: Manifest
    weights: Mapping[str, Array]

    def adapter(self, rank: int = 2, seed: int = 1, layers: Sequence[str] = ()) -> Adapter:
        """Return a random adapter for some layers, all unless named; scaling 2."""
        rng = np.random.default_rng(seed)
        found = {}
        for path in layers or self.manifest.layers:
            spec = self.manifest.layers[path]
            A = rng.standard_normal((rank, *spec.in_shape)) / np.sqrt(spec.in_shape[0])
            B = rng.standard_normal((spec.out_features, rank)) / np.sqrt(rank)
            found[path] = fl.LoraLayer(A, B, 2.0)
        config = fl.LoraConfig(
            rank=rank, lora_alpha=2 * rank, target_modules=self.manifest.lora.target_modules
        )
        return Adapter(found, config, self.manifest.base)


def write_classifier(
    folder: Path, *, rows: Sequence[int] = (16,), seed: int = 0, web: bool = False
) -> HandMade:
    """Write a classifier of (batch, 6) float32 with infer.onnx and a train graph for each `rows`.

    Layers: ``fc1`` (6 to 8), ``fc2`` (8 to 3).
    """
    rng = np.random.default_rng(seed)
    weights = {
        "fc1.weight": _normal(rng, (HIDDEN, FEATURES), 0.6),
        "fc1.bias": _normal(rng, (HIDDEN,), 0.3),
        "fc2.weight": _normal(rng, (CLASSES, HIDDEN), 0.6),
        "fc2.bias": _normal(rng, (CLASSES,), 0.3),
    }
    layers = {
        "fc1": LayerSpec("linear", (FEATURES,), HIDDEN, parameters=HIDDEN * (FEATURES + 1)),
        "fc2": LayerSpec("linear", (HIDDEN,), CLASSES, parameters=CLASSES * (HIDDEN + 1)),
    }
    base = BaseWeights(weights)
    graph = _Graph(base, layers, web)
    z, _ = _classifier_forward(graph, graph.input("inputs", "float32", ("batch", FEATURES)))
    graph.output(z, "logits", ("batch", CLASSES))
    graphs, infos = {"infer.onnx": graph.model()}, {"infer.onnx": GraphInfo("infer")}
    for size in rows:
        name = f"train_{size}.onnx"
        graphs[name] = _classifier_step(base, layers, web, size)
        infos[name] = GraphInfo("train", size)
    manifest = Manifest(
        base="c1" * 32,
        base_id="hand-made-classifier",
        task="classification",
        layers=layers,
        lora=fl.LoraConfig(rank=2, lora_alpha=4, target_modules=("fc1", "fc2")),
        graphs=infos,
        files={},
        input_dtype="float32",
        input_shape=(FEATURES,),
        outputs=CLASSES,
        labels=("rest", "walk", "run"),
        web=web,
        made_by={"test": "1"},
    )
    return _finish(folder, manifest, weights, base, graphs)


def write_language_model(
    folder: Path,
    *,
    buckets: Sequence[tuple[int, int]] = ((4, 16),),
    seed: int = 0,
    web: bool = False,
    decode: bool = True,
) -> HandMade:
    """Write a language model with infer, decode and train graphs, and its tokenizer.

    LoRA layers: ``model.layers.0.attention`` with ``q_proj``, ``v_proj``, ``o_proj`` (16 to 16).
    """
    rng = np.random.default_rng(seed)
    tokenizer = _tokenizer_json()
    vocabulary = len(tokenizer["model"]["vocab"])
    weights = {"embed.weight": _normal(rng, (vocabulary, WIDTH), 0.8)}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weights[f"{ATTENTION}.{name}.weight"] = _normal(rng, (WIDTH, WIDTH), 0.4)
        weights[f"{ATTENTION}.{name}.bias"] = _normal(rng, (WIDTH,), 0.1)
    layers = {
        f"{ATTENTION}.{name}": LayerSpec("linear", (WIDTH,), WIDTH, parameters=WIDTH * (WIDTH + 1))
        for name in ("q_proj", "v_proj", "o_proj")
    }
    base = BaseWeights(weights)
    graphs = {"infer.onnx": _language_infer(base, layers, web, vocabulary)}
    infos = {"infer.onnx": GraphInfo("infer")}
    if decode:
        graphs["decode.onnx"] = _language_decode(base, layers, web, vocabulary)
        infos["decode.onnx"] = GraphInfo("decode")
    for rows, positions in buckets:
        name = f"train_{rows}x{positions}.onnx"
        graphs[name] = _language_step(base, layers, web, vocabulary, rows, positions)
        infos[name] = GraphInfo("train", rows, positions)
    manifest = Manifest(
        base="1a" * 32,
        base_id="hand-made-language",
        task="next-token",
        layers=layers,
        lora=fl.LoraConfig(rank=2, lora_alpha=4, target_modules=("q_proj", "v_proj", "o_proj")),
        graphs=infos,
        files={},
        outputs=vocabulary,
        web=web,
        made_by={"test": "1"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return _finish(folder, manifest, weights, base, graphs)


# The same in NumPy.


def classifier_logits(
    weights: Mapping[str, Array], inputs: Array, *adapters: Adapter
) -> np.ndarray[Any, Any]:
    """(batch, classes) of the base with the sum of some adapters, in float64."""
    h = _plain_linear(weights, "fc1", inputs.astype(np.float64), adapters)
    return _plain_linear(weights, "fc2", np.maximum(h, 0), adapters)


def language_logits(
    weights: Mapping[str, Array], ids: np.ndarray[Any, Any], *adapters: Adapter
) -> np.ndarray[Any, Any]:
    """(batch, time, vocabulary) of the base with the sum of some adapters, in float64."""
    batch, time = ids.shape
    x = weights["embed.weight"].astype(np.float64)[ids]
    q, k, v = (
        _plain_linear(weights, f"{ATTENTION}.{name}", x, adapters)
        .reshape(batch, time, HEADS, SIZE)
        .transpose(0, 2, 1, 3)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    distance = np.arange(time)[:, None] - np.arange(time)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(SIZE)
    scores = np.where(distance >= 0, scores - SLOPES[:, None, None] * distance, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (p / p.sum(-1, keepdims=True)) @ v
    mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, time, WIDTH)
    y = x + _plain_linear(weights, f"{ATTENTION}.o_proj", mixed, adapters)
    return y @ weights["embed.weight"].astype(np.float64).T


def mean_loss(logits: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    """Return the mean cross-entropy over the targets that are not -100."""
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    counted = targets >= 0
    chosen = np.take_along_axis(log_p, np.where(counted, targets, 0)[..., None], -1)[..., 0]
    return float(-chosen[counted].mean())


def _plain_linear(
    weights: Mapping[str, Array], path: str, x: np.ndarray[Any, Any], adapters: Sequence[Adapter]
) -> np.ndarray[Any, Any]:
    weight = weights[f"{path}.weight"].astype(np.float64)
    for adapter in adapters:
        if path in adapter.layers:
            layer = adapter[path]
            weight = weight + layer.scaling * layer.B.astype(np.float64) @ layer.A
    return x @ weight.T + weights[f"{path}.bias"]


# The graphs.


class _Graph:
    """Collects nodes; every method returns the name of what it made."""

    def __init__(
        self, base: BaseWeights, layers: Mapping[str, LayerSpec], web: bool, train: bool = False
    ) -> None:
        self.base, self.layers, self.web, self.train = base, layers, web, train
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str) -> str:
        tensor = self.base.initializer(name)
        self.initializers[tensor.name] = tensor
        return str(tensor.name)

    def constant(self, value: Any, dtype: Any) -> str:
        array = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def factors(self) -> None:
        """Declare the factors as inputs, after the data's."""
        for path, spec in self.layers.items():
            for frozen in (False, True) if self.train else (False,):
                rank = f"{'frozen_' if frozen else ''}rank_{path}"
                name_A, name_B = factor_names(path, frozen=frozen)
                self.input(name_A, "float32", (rank, *spec.in_shape))
                self.input(name_B, "float32", (spec.out_features, rank))
                if not self.web:
                    shapes = {name_A: (1, *spec.in_shape), name_B: (spec.out_features, 1)}
                    for name, shape in shapes.items():
                        zeros = np.zeros(shape, np.float32)
                        self.initializers[name] = numpy_helper.from_array(zeros, name)

    def transposed(self, value: str) -> str:
        return self.op("Transpose", value, perm=[1, 0])

    def linear(self, x: str, path: str) -> str:
        """(rows, in) → (rows, out): the base's weight, then the product of each adapter."""
        weights = self.weight(f"{path}.weight"), self.weight(f"{path}.bias")
        y = self.op("Gemm", x, *weights, transB=1)
        if path in self.layers:
            for frozen in (False, True) if self.train else (False,):
                A, B = factor_names(path, frozen=frozen)
                narrow = self.op("Gemm", x, A, transB=1)
                y = self.op("Add", y, self.op("Gemm", narrow, B, transB=1))
        return y

    def gradients(self, dy: str, x: str, path: str) -> None:
        """Output the gradients of a layer's own factors, from that of its output."""
        A, B = factor_names(path)
        spec, rank = self.layers[path], f"rank_{path}"
        dB = self.op("Gemm", dy, self.op("Gemm", x, A, transB=1), transA=1)
        dA = self.op("Gemm", self.op("MatMul", dy, B), x, transA=1)
        self.output(dA, A.removesuffix("weight") + "grad", (rank, *spec.in_shape))
        self.output(dB, B.removesuffix("weight") + "grad", (spec.out_features, rank))

    def backward(self, dy: str, path: str) -> str:
        """(rows, out) → (rows, in): the gradient of a layer's input."""
        dx = self.op("MatMul", dy, self.weight(f"{path}.weight"))
        if path in self.layers:
            for frozen in (False, True):
                A, B = factor_names(path, frozen=frozen)
                dx = self.op("Add", dx, self.op("MatMul", self.op("MatMul", dy, B), A))
        return dx

    def loss(self, z: str, targets: str, classes: int) -> str:
        """Output the loss of logits (rows, classes); return its gradient in their shape."""
        axis = self.constant([1], np.int64)
        column = self.op("Unsqueeze", targets, axis)
        hot = self.op("Equal", column, self.constant(np.arange(classes), np.int64))
        hot = self.op("Cast", hot, to=TensorProto.FLOAT)
        counted = self.op("GreaterOrEqual", column, self.constant(0, np.int64))
        counted = self.op("Cast", counted, to=TensorProto.FLOAT)
        number = self.op("ReduceSum", counted, keepdims=0)
        number = self.op("Max", number, self.constant(1, np.float32))
        log_p = self.op("LogSoftmax", z, axis=1)
        total = self.op("Neg", self.op("ReduceSum", self.op("Mul", log_p, hot), keepdims=0))
        self.output(self.op("Div", total, number), "loss", ())
        dz = self.op("Mul", self.op("Sub", self.op("Softmax", z, axis=1), hot), counted)
        return self.op("Div", dz, number)

    def model(self) -> onnx.ModelProto:
        self.factors()
        graph = helper.make_graph(
            self.nodes, "graph", self.inputs, self.outputs, list(self.initializers.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="test"
        )
        model.ir_version = 9
        return model


def _classifier_forward(graph: _Graph, x: str) -> tuple[str, tuple[str, str]]:
    h = graph.linear(x, "fc1")
    r = graph.op("Relu", h)
    return graph.linear(r, "fc2"), (h, r)


def _classifier_step(
    base: BaseWeights, layers: Mapping[str, LayerSpec], web: bool, rows: int
) -> onnx.ModelProto:
    graph = _Graph(base, layers, web, train=True)
    x = graph.input("inputs", "float32", (rows, FEATURES))
    targets = graph.input("targets", "int64", (rows,))
    z, (h, r) = _classifier_forward(graph, x)
    dz = graph.loss(z, targets, CLASSES)
    graph.gradients(dz, r, "fc2")
    open_gate = graph.op("Greater", h, graph.constant(0, np.float32))
    gate = graph.op("Cast", open_gate, to=TensorProto.FLOAT)
    dh = graph.op("Mul", graph.backward(dz, "fc2"), gate)
    graph.gradients(dh, x, "fc1")
    return graph.model()


def _split(graph: _Graph, rows: str, shape: str) -> str:
    """(batch · time, width) → (batch, heads, time, size); `shape`: (batch, time, heads, size)."""
    return graph.op("Transpose", graph.op("Reshape", rows, shape), perm=[0, 2, 1, 3])


def _merge(graph: _Graph, heads: str) -> str:
    """(batch, heads, time, size) → (batch · time, width)."""
    inward = graph.op("Transpose", heads, perm=[0, 2, 1, 3])
    return graph.op("Reshape", inward, graph.constant([-1, WIDTH], np.int64))


def _language_forward(
    graph: _Graph, ids: str, past: tuple[str, str] | None
) -> tuple[str, dict[str, str]]:
    """Return y, (batch · time, width), before the head, and what the backward pass needs."""
    embedded = graph.op("Gather", graph.weight("embed.weight"), ids)
    x = graph.op("Reshape", embedded, graph.constant([-1, WIDTH], np.int64))
    sizes = graph.op("Shape", ids)  # (batch, time)
    shape = graph.op("Concat", sizes, graph.constant([HEADS, SIZE], np.int64), axis=0)
    projected = {name: graph.linear(x, f"{ATTENTION}.{name}_proj") for name in "qkv"}
    q, k, v = (_split(graph, projected[name], shape) for name in "qkv")
    time = graph.op("Squeeze", graph.op("Shape", ids, start=1, end=2))
    if past is not None:
        k = graph.op("Concat", past[0], k, axis=2)
        v = graph.op("Concat", past[1], v, axis=2)
    whole = graph.op("Squeeze", graph.op("Shape", k, start=2, end=3))
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    own = graph.op("Range", graph.op("Sub", whole, time), whole, one)  # positions of the queries
    column = graph.op("Unsqueeze", own, graph.constant([1], np.int64))
    distance = graph.op("Sub", column, graph.op("Range", zero, whole, one))
    slopes = graph.constant(-SLOPES[:, None, None], np.float32)
    bias = graph.op("Mul", slopes, graph.op("Cast", distance, to=TensorProto.FLOAT))
    future = graph.op("Less", distance, zero)
    bias = graph.op("Where", future, graph.constant(MASKED, np.float32), bias)
    root = graph.constant(np.sqrt(SIZE), np.float32)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    p = graph.op("Softmax", graph.op("Add", graph.op("Div", scores, root), bias), axis=-1)
    mixed = _merge(graph, graph.op("MatMul", p, v))
    y = graph.op("Add", x, graph.linear(mixed, f"{ATTENTION}.o_proj"))
    kept = {"x": x, "k": k, "v": v, "p": p, "mixed": mixed, "shape": shape, "root": root}
    return y, {**kept, "sizes": sizes}


def _language_infer(
    base: BaseWeights, layers: Mapping[str, LayerSpec], web: bool, vocabulary: int
) -> onnx.ModelProto:
    graph = _Graph(base, layers, web)
    ids = graph.input("inputs", "int64", ("batch", "time"))
    y, kept = _language_forward(graph, ids, None)
    z = graph.op("Gemm", y, graph.weight("embed.weight"), transB=1)
    shape = graph.op("Concat", kept["sizes"], graph.constant([vocabulary], np.int64), axis=0)
    graph.output(graph.op("Reshape", z, shape), "logits", ("batch", "time", vocabulary))
    return graph.model()


def _language_decode(
    base: BaseWeights, layers: Mapping[str, LayerSpec], web: bool, vocabulary: int
) -> onnx.ModelProto:
    graph = _Graph(base, layers, web)
    ids = graph.input("inputs", "int64", ("batch", "time"))
    shape = ("batch", HEADS, "past", SIZE)
    key = graph.input("past_key_values.0.key", "float32", shape)
    value = graph.input("past_key_values.0.value", "float32", shape)
    y, kept = _language_forward(graph, ids, (key, value))
    width = graph.constant([WIDTH], np.int64)
    rows = graph.op("Reshape", y, graph.op("Concat", kept["sizes"], width, axis=0))
    last = graph.op("Gather", rows, graph.constant(-1, np.int64), axis=1)
    z = graph.op("Gemm", last, graph.weight("embed.weight"), transB=1)
    graph.output(z, "logits", ("batch", vocabulary))
    for name in ("key", "value"):
        graph.output(kept[name[0]], f"present.0.{name}", ("batch", HEADS, "whole", SIZE))
    return graph.model()


def _language_step(
    base: BaseWeights,
    layers: Mapping[str, LayerSpec],
    web: bool,
    vocabulary: int,
    rows: int,
    positions: int,
) -> onnx.ModelProto:
    graph = _Graph(base, layers, web, train=True)
    ids = graph.input("inputs", "int64", (rows, positions))
    targets = graph.input("targets", "int64", (rows, positions))
    y, kept = _language_forward(graph, ids, None)
    z = graph.op("Gemm", y, graph.weight("embed.weight"), transB=1)
    flat = graph.op("Reshape", targets, graph.constant([-1], np.int64))
    dz = graph.loss(z, flat, vocabulary)
    dy = graph.op("MatMul", dz, graph.weight("embed.weight"))
    graph.gradients(dy, kept["mixed"], f"{ATTENTION}.o_proj")
    dmixed = _split(graph, graph.backward(dy, f"{ATTENTION}.o_proj"), kept["shape"])
    p = kept["p"]
    dv = graph.op("MatMul", graph.op("Transpose", p, perm=[0, 1, 3, 2]), dmixed)
    graph.gradients(_merge(graph, dv), kept["x"], f"{ATTENTION}.v_proj")
    dp = graph.op("MatMul", dmixed, graph.op("Transpose", kept["v"], perm=[0, 1, 3, 2]))
    axis = graph.constant([-1], np.int64)
    mean = graph.op("ReduceSum", graph.op("Mul", dp, p), axis, keepdims=1)
    ds = graph.op("Mul", p, graph.op("Sub", dp, mean))
    dq = graph.op("Div", graph.op("MatMul", ds, kept["k"]), kept["root"])
    graph.gradients(_merge(graph, dq), kept["x"], f"{ATTENTION}.q_proj")
    return graph.model()


# Files.


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    return np.asarray(scale * rng.standard_normal(shape), np.float32)


def _tokenizer_json() -> dict[str, Any]:
    """Byte-level BPE over small letters and a few marks: small enough to try every word."""
    tokens = ["<|endoftext|>", "Ġ", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": MERGES,
        },
    }  # fmt: skip


def _finish(
    folder: Path,
    manifest: Manifest,
    weights: Mapping[str, Array],
    base: BaseWeights,
    graphs: Mapping[str, onnx.ModelProto],
) -> HandMade:
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in graphs.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    base.write(folder)
    return HandMade(folder, rewrite_manifest(folder, manifest), weights)


def rewrite_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digests of the files that are there now."""
    files = {
        path.name: FileInfo(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    manifest = replace(manifest, files=files)
    write_manifest(manifest, folder)
    return manifest
