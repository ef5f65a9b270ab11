"""What a bundle's graphs say, beside what torch says of the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.device.manifest import factors_of
from fedlora.export.trace import Subject
from fedlora.nn.inject import inject_lora, load_adapter_into, lora_modules, remove_lora
from fedlora.nn.outputs import logits_of
from fedlora.nn.rows import NOT_COUNTED
from fedlora.nn.tasks import get_task
from fedlora.randomness import rng

__all__ = [
    "base_logits",
    "canary_inputs",
    "decode_difference",
    "infer_difference",
    "train_difference",
]

Values: TypeAlias = dict[str, npt.NDArray[Any]]

RANKS = (1, 4, 8, 16)
# Rows and tokens of a batch for each of these; the base alone comes first.
SIZES = ((2, 5), (1, 1), (3, 8), (2, 16), (4, 3))
CANARY_SIZE = (2, 8)  # rows and tokens; a large vocabulary's logits must stay small
EFFECT = 0.05  # of a random adapter: B is about as large as trained ones, its scaling folded in


def infer_difference(path: Path, subject: Subject, defaults: Mapping[str, Any]) -> float:
    """The largest difference of logits, of the base and of adapters of several ranks.

    Relative to the largest logit of the batch where that is over 1.
    """
    session, found = _session(path), []
    masked = subject.task == "classification"
    for rank, (rows, time) in zip((None, *RANKS), SIZES, strict=True):
        inputs = _inputs(subject, rows, time)
        adapter = None if rank is None else _adapter(subject, rank)
        feed = {"inputs": inputs} | _factors(adapter, defaults)
        with _injected(subject.model, adapter), torch.no_grad():
            expected = logits_of(subject.model, torch.from_numpy(inputs), masked=masked).numpy()
        # Behind a text nobody reads a language model, and its rounding is at its worst there.
        read = inputs != 0 if subject.task == "next-token" else np.ones(len(inputs), np.bool_)
        found.append(_difference(session.run(["logits"], feed)[0][read], expected[read]))
    return _largest(found)


def decode_difference(
    path: Path, subject: Subject, empty: Mapping[str, Any], defaults: Mapping[str, Any]
) -> float:
    """The largest difference of a text's logits, part by part, to those of the whole text.

    empty: the cache of one text without tokens.
    """
    session, found = _session(path), []
    names = [output.name for output in session.get_outputs()]
    for rank, parts in ((None, (1, 1)), (8, (5, 1, 3))):
        ids = _inputs(subject, 2, sum(parts), padded=False)
        adapter = None if rank is None else _adapter(subject, rank)
        with _injected(subject.model, adapter), torch.no_grad():
            whole = logits_of(subject.model, torch.from_numpy(ids), masked=False).numpy()
        past = {name: np.repeat(array, 2, 0) for name, array in empty.items()}
        done = 0
        for part in parts:
            feed = {"inputs": ids[:, done : done + part], **past, **_factors(adapter, defaults)}
            logits, *present = session.run(names, feed)
            done += part
            found.append(_difference(logits, whole[:, done - 1]))
            past = dict(zip(past, present, strict=True))
    return _largest(found)


def train_difference(
    path: Path, subject: Subject, rows: int, positions: int | None, defaults: Mapping[str, Any]
) -> float:
    """The largest difference of loss and gradients over two ranks.

    Of the loss absolute; of all gradients together the norm of the difference by their norm.
    """
    session, found = _session(path), []
    names = [output.name for output in session.get_outputs()]
    task = get_task(subject.task)
    for rank in (1, 8):
        adapter = _adapter(subject, rank)
        inputs = _inputs(subject, rows, positions or 0)
        targets = _targets(subject, inputs)
        feed = {"inputs": inputs, "targets": targets, **_factors(adapter, defaults)}
        loss, *gradients = session.run(names, feed)
        with _injected(subject.model, adapter):
            expected = task.loss(subject.model, {"inputs": inputs, "targets": targets})
            layers = lora_modules(subject.model).values()
            factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
            wanted = [one.numpy() for one in torch.autograd.grad(expected, factors)]
        found.append(abs(float(loss) - float(expected.detach())))
        pairs = list(zip(gradients, wanted, strict=True))
        distance = np.sqrt(sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs))
        norm = np.sqrt(sum(float(np.square(b, dtype=np.float64).sum()) for _, b in pairs))
        found.append(float(distance / max(norm, 1e-12)))
    return _largest(found)


def canary_inputs(subject: Subject) -> npt.NDArray[Any]:
    """Return the inputs of a bundle's canaries, none of them padding."""
    return _inputs(subject, *CANARY_SIZE, padded=False)


def base_logits(
    path: Path, inputs: npt.NDArray[Any], defaults: Mapping[str, Any]
) -> npt.NDArray[Any]:
    """(rows, outputs) of the base in infer.onnx; of a language model at the last position."""
    (logits,) = _session(path).run(["logits"], {"inputs": inputs, **defaults})
    return np.asarray(logits[:, -1] if logits.ndim == 3 else logits, np.float32)


def _vocabulary_of(model: nn.Module) -> int:
    """Return how many token ids a text model knows: the rows of its first embedding."""
    asked = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(asked, int):
        return asked
    return next(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning for every optional input
    options.intra_op_num_threads = 2
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))


def _largest(found: Sequence[float]) -> float:
    """Return the largest number, NaN if there is one: Python's max would pass over it."""
    return float(np.max(found))


@contextmanager
def _injected(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    if adapter is None:
        yield
        return
    inject_lora(model, adapter.config, base="")
    try:
        load_adapter_into(model, adapter)
        yield
    finally:
        remove_lora(model)


def _adapter(subject: Subject, rank: int) -> Adapter:
    """A random adapter whose scaling is 1, so that B is the folded one."""
    generator = rng(rank, "parity")
    layers = {}
    for path, spec in subject.layers.items():
        A = generator.normal(size=(rank, *spec.in_shape)) / np.sqrt(np.prod(spec.in_shape))
        B = generator.normal(size=(spec.out_features, rank)) * (EFFECT / np.sqrt(rank))
        layers[path] = LoraLayer(A, B, scaling=1.0, kind=spec.kind)
    targets = tuple(subject.layers)
    return Adapter(layers, LoraConfig(rank=rank, lora_alpha=rank, target_modules=targets))


def _factors(adapter: Adapter | None, defaults: Mapping[str, Any]) -> Values:
    """Inputs for an adapter; `defaults` are what a bundle for the web must be fed."""
    return dict(defaults) | ({} if adapter is None else dict(factors_of(adapter)))


def _inputs(subject: Subject, rows: int, time: int, *, padded: bool = True) -> npt.NDArray[Any]:
    generator = rng(rows, "parity inputs", time)
    if not subject.is_text:
        return generator.normal(size=(rows, *subject.input_shape)).astype(np.float32)
    ids = generator.integers(1, _vocabulary_of(subject.model), (rows, time))
    lengths = generator.integers(1, time + 1, rows)
    lengths[0] = time
    return np.where(np.arange(time) < lengths[:, None], ids, 0) if padded else ids


def _targets(subject: Subject, inputs: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if subject.task == "classification":
        return np.arange(len(inputs)) % 2
    following = np.concatenate((inputs[:, 1:], np.zeros_like(inputs[:, :1])), 1)
    return np.where(following == 0, NOT_COUNTED, following)
