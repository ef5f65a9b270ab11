"""Write a device bundle: trace, emit, compare with torch, and only then say what it is.

A bundle is written whole or not at all, the same bytes for the same base, layers, graphs and
versions on the same kind of processor (the last digits of the canaries' logits are its own); where
such a one is there already, nothing is done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, LoraConfig
from fedlora.data.text import TokenizerLike, load_tokenizer
from fedlora.device.canaries import Canaries, write_canaries
from fedlora.device.manifest import (
    BASE_DATA,
    CANARIES,
    MANIFEST,
    TOKENIZER,
    FileInfo,
    GraphInfo,
    Manifest,
    Precision,
    TrainPrecision,
    read_manifest,
    sha256_of,
    verify_files,
    write_manifest,
)
from fedlora.errors import ConfigError, FormatError, RunError, UnsupportedError
from fedlora.export.capture import tensors_of
from fedlora.export.decode import decode_graph
from fedlora.export.emit import emit
from fedlora.export.merged import merged_into
from fedlora.export.parity import (
    base_logits,
    canary_inputs,
    decode_difference,
    infer_difference,
    train_difference,
)
from fedlora.export.trace import Subject, example, infer_graph, subject_of, train_graph
from fedlora.export.traced import Traced
from fedlora.export.weights import BaseWeights
from fedlora.files import replace_folder, require_replaceable
from fedlora.nn.classifier import NEW_HEAD, Classifier
from fedlora.nn.load import Base, load_base
from fedlora.targets import select_targets

__all__ = ["export_bundle"]

Report = Callable[[str], None]
ManifestTask = Literal["next-token", "classification"]

TEXT_BUCKETS, FIXED_BUCKETS = ("8x32", "8x64"), ("16",)
# The largest differences to torch that a float32 bundle may have; see fedlora.export.parity.
INFER_LIMIT, TRAIN_LIMIT = 1e-5, 5e-5
QUANTIZED = {
    onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4,
}  # fmt: skip
PACKAGES = ("fedlora", "onnx", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class _Plan:
    """A graph to write."""

    file: str
    info: GraphInfo
    trace: Callable[[Subject], Traced]


def export_bundle(
    base: str | Base,
    out: Path | str,
    *,
    lora: LoraConfig | None = None,
    train: Sequence[str] | None = None,
    precision: Precision = "fp32",
    train_precision: TrainPrecision = "exact",
    decode: bool = False,
    web: bool = False,
    merge: Adapter | None = None,
    task: ManifestTask | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    again: bool = False,
    report: Report = lambda line: None,
) -> Manifest:
    """Write the bundle of a base into the folder `out` and return its manifest.

    base: what `load_base` takes, or what it returned. lora: the layers that take factors, and how
    an adapter starts. train: train graphs, "8x32" for 8 rows of 32 tokens, "16" for 16 rows of a
    fixed shape; None: 8x32 and 8x64, or 16, or with merge none; (): none. precision: of the base's
    weights as they are stored. train_precision: "exact" gradients of that base, or, faster,
    approximate ones by products of int8 numbers: in the backward pass alone ("int8-backward", whose
    loss is still exact) or in both ("int8"); the manifest says so. decode: a graph that writes
    text. web: factors are required inputs. merge: an adapter that goes into the weights. task,
    num_classes, input_shape (of one example that is not text): where the base does not say them.
    again: even if the bundle is there already. report is given lines about the progress.

    Raises `UnsupportedError` for DoRA, whose graphs would need the whole weight, and for what has
    no translation; `ConfigError` for options that do not fit the base; `RunError` when a graph of
    a float32 bundle is further from torch than 1e-5 (loss and gradients: 5e-5).
    """
    lora, out = lora or LoraConfig(), Path(out)
    if lora.uses_dora:
        raise UnsupportedError(
            f"export: variant {lora.variant!r} divides by the norm of the whole weight, which "
            "changes with every adapter, and a graph takes A and B alone; put a DoRA adapter into "
            "the weights with --merge, or train another variant"
        )
    loaded = base if isinstance(base, Base) else load_base(base, num_classes=num_classes)
    task = task or _task_of(loaded)
    shape = _input_shape(loaded.model, input_shape, task)
    model, fingerprint = loaded.model, loaded.card.fingerprint
    subject = subject_of(model, select_targets(loaded.card.layers, lora), task, shape)
    _require_head(subject, merge)
    _require_inputs(subject)
    plans = _plans(subject, _train_of(train, merge, subject), decode)
    planned = Manifest(
        base=fingerprint,
        base_id=loaded.card.id,
        task=task,
        layers=subject.layers,
        lora=lora,
        graphs={plan.file: plan.info for plan in plans},
        files={},
        input_dtype="int64" if subject.is_text else "float32",
        input_shape=shape,
        labels=loaded.card.labels,
        precision=precision,
        train_precision=train_precision,
        web=web,
        merged=None if merge is None else merge.fingerprint(),
        made_by=_versions(),
    )
    tokenizer = _tokenizer_file(loaded.tokenizer)
    if not again and (there := _already(out, planned, tokenizer)) is not None:
        report(f"{out} is this bundle already; --again writes it anew")
        return there
    # Graphs that the new bundle does not have are an old bundle's, if there is one.
    owned = ("*.onnx", TOKENIZER, CANARIES) if (out / MANIFEST).is_file() else ()
    files = {*planned.graphs, BASE_DATA, CANARIES, MANIFEST} | ({TOKENIZER} if tokenizer else set())
    require_replaceable(out, files, owned)
    made: list[Manifest] = []

    def build(folder: Path) -> None:
        with ExitStack() as stack:
            if merge is not None:
                stack.enter_context(merged_into(model, merge, fingerprint))
            made.append(_build(folder, subject, plans, planned, tokenizer, report))

    replace_folder(out, build, owned=owned)
    return made[0]


def _build(
    folder: Path,
    subject: Subject,
    plans: Sequence[_Plan],
    planned: Manifest,
    tokenizer: bytes | None,
    report: Report,
) -> Manifest:
    arrays = {name: tensor.numpy() for name, tensor in tensors_of(subject.model).items()}
    weights = BaseWeights(arrays)
    ends: dict[str, _Ends] = {}
    for plan in plans:
        report(f"{plan.file}: tracing")
        traced = plan.trace(subject)
        graph = emit(
            traced,
            weights,
            precision=planned.precision,
            required_factors=planned.web,
            train_precision=planned.train_precision,
        )
        _require_quantized(graph, plan, planned)
        data = graph.SerializeToString(deterministic=True)
        (folder / plan.file).write_bytes(data)
        report(f"{plan.file}: {len(graph.graph.node):,} nodes, {len(data):,} bytes")
        ends[plan.file] = traced.examples, traced.defaults
        outputs = traced.module.graph.output_node().args[0]
        if plan.info.kind == "infer":
            planned = replace(planned, outputs=int(outputs[0].meta["val"].shape[-1]))  # type: ignore[index,union-attr]
    weights.write(folder)
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer)
    graphs = {}
    for plan in plans:
        found = _difference(folder / plan.file, plan, subject, ends[plan.file], planned.web)
        report(f"{plan.file}: differs from torch by {found:.1e}")
        limit = TRAIN_LIMIT if plan.info.kind == "train" else INFER_LIMIT
        if not isfinite(found) or (found > limit and _is_exact(plan, planned)):
            raise RunError(
                f"{plan.file}: expected at most {limit:g} between ONNX Runtime and torch, found "
                f"{found:.2g}; the bundle is not written"
            )
        # One digit: the last ones of a sum depend on the machine.
        graphs[plan.file] = replace(plan.info, difference=float(f"{found:.0e}"))
    write_canaries(folder, _canaries(folder, subject, plans, ends, planned.web))
    files = {
        path.name: FileInfo(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
    }
    manifest = replace(planned, graphs=graphs, files=files)
    write_manifest(manifest, folder)
    return manifest


def _is_exact(plan: _Plan, planned: Manifest) -> bool:
    """Whether a graph computes with the base's own weights and with nothing that is rounded."""
    approximate = plan.info.kind == "train" and planned.train_precision != "exact"
    return planned.precision == "fp32" and not approximate


def _require_quantized(graph: onnx.ModelProto, plan: _Plan, planned: Manifest) -> None:
    if _is_exact(plan, planned) or _is_quantized(graph):
        return
    option = "--train-precision" if planned.precision == "fp32" else "--quantize"
    raise UnsupportedError(
        f"{plan.file}: expected weights of linear layers that could be quantized, found none; "
        f"leave {option} out"
    )


def _is_quantized(graph: onnx.ModelProto) -> bool:
    return any(
        tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.data_type in QUANTIZED
        for tensor in graph.graph.initializer
    )


_Ends: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # examples and defaults


def _difference(path: Path, plan: _Plan, subject: Subject, ends: _Ends, web: bool) -> float:
    examples, zeros = ends
    defaults = {name: value.numpy() for name, value in zeros.items()} if web else {}
    if plan.info.kind == "infer":
        return infer_difference(path, subject, defaults)
    if plan.info.kind == "train":
        rows = plan.info.rows or 0
        return train_difference(path, subject, rows, plan.info.positions, defaults)
    empty = {
        name: example[:1, :, :0].numpy()
        for name, example in examples.items()
        if name.startswith("past_key_values")
    }
    return decode_difference(path, subject, empty, defaults)


def _canaries(
    folder: Path,
    subject: Subject,
    plans: Sequence[_Plan],
    ends: Mapping[str, _Ends],
    web: bool,
) -> Canaries:
    """Return inputs, and the logits of infer.onnx: of a quantized base those of its own."""
    plan = next(plan for plan in plans if plan.info.kind == "infer")
    _, zeros = ends[plan.file]
    defaults = {name: value.numpy() for name, value in zeros.items()} if web else {}
    inputs = canary_inputs(subject)
    return Canaries(inputs, base_logits(folder / plan.file, inputs, defaults))


def _tokenizer_file(source: TokenizerLike) -> bytes | None:
    """Return the tokenizer.json of what `load_data` takes, None where there is none."""
    if source is None:
        return None
    if isinstance(source, str | Path):
        path = Path(source)
        return (path / TOKENIZER if path.is_dir() else path).read_bytes()
    return load_tokenizer(source).to_str(pretty=True).encode()


def _train_of(
    train: Sequence[str] | None, merge: Adapter | None, subject: Subject
) -> Sequence[str]:
    """Return the train graphs that are asked for, or usual; a merged bundle takes no adapter."""
    if merge is None:
        usual = TEXT_BUCKETS if subject.is_text else FIXED_BUCKETS
        return usual if train is None else train
    if train:
        raise ConfigError(
            "export: --merge goes without --train: a bundle with an adapter in its weights takes "
            "no other, and so trains none; export the base as well"
        )
    return ()


def _plans(subject: Subject, train: Sequence[str], decode: bool) -> list[_Plan]:
    plans = [_Plan("infer.onnx", GraphInfo("infer"), infer_graph)]
    if decode:
        plans.append(_Plan("decode.onnx", GraphInfo("decode"), decode_graph))
    for bucket in dict.fromkeys(train):
        rows, positions = _bucket(bucket, subject.is_text)
        trace = partial(train_graph, rows=rows, positions=positions)
        plans.append(_Plan(f"train_{bucket}.onnx", GraphInfo("train", rows, positions), trace))
    return plans


def _bucket(text: str, is_text: bool) -> tuple[int, int | None]:
    form = r"([1-9]\d{0,5})x([1-9]\d{0,5})" if is_text else r"([1-9]\d{0,5})"
    match = re.fullmatch(form, text)
    if match is None:
        expected = "ROWSxTOKENS such as 8x32" if is_text else "a number of rows such as 16"
        raise ConfigError(f"--train: expected {expected} for this base, found {text!r}")
    rows, *positions = (int(number) for number in match.groups())
    return rows, positions[0] if positions else None


def _task_of(base: Base) -> ManifestTask:
    task = base.card.task
    if task == "next-token":
        return "next-token"
    if task == "classification":
        return "classification"
    raise ConfigError(
        f"export: base {base.card.id!r} has no head (its task is {task!r}): put one on with "
        "--num-classes"
    )


def _require_head(subject: Subject, merge: Adapter | None) -> None:
    """Raise for a new head of zeros without LoRA: all logits and gradients would be 0."""
    if not isinstance(subject.model, Classifier) or NEW_HEAD in subject.layers:
        return
    if merge is None and not subject.model.zero_head.weight.any():
        raise ConfigError(
            f"export: the new head is zero, and LoRA on it is the head: add {NEW_HEAD} to "
            "--target-modules"
        )


def _require_inputs(subject: Subject) -> None:
    """Run the model once: what it says of inputs that it does not take is its own."""
    inputs = example(subject, 2, 3)
    try:
        with torch.no_grad():
            subject.model(inputs)
    except Exception as error:  # a model's forward may raise anything
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"export: {type(subject.model).__name__} cannot run on inputs of shape "
            f"{tuple(inputs.shape)} ({inputs.dtype}): {text}; is --input-shape right?"
        ) from error


def _input_shape(
    model: nn.Module, given: tuple[int, ...] | None, task: ManifestTask
) -> tuple[int, ...]:
    """Return () for text, else one example's shape: as given, as the model says, or as it reads."""
    if given is not None:
        return given
    stated = getattr(model, "input_shape", None)
    if isinstance(stated, tuple):
        return stated
    if task == "next-token" or any(isinstance(m, nn.Embedding) for m in model.modules()):
        return ()
    first = next((m for m in model.modules() if not list(m.children())), None)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    raise ConfigError(
        f"export: {type(model).__name__} does not say what one example's shape is: give "
        "--input-shape, such as 6,100, or the model an attribute input_shape"
    )


def _already(out: Path, planned: Manifest, tokenizer: bytes | None) -> Manifest | None:
    """Return the manifest of the bundle in `out` if it is what would be written, and undamaged."""
    try:
        there = read_manifest(out)
        verify_files(out, there)
    except (FormatError, OSError):
        return None
    graphs = {name: replace(graph, difference=0.0) for name, graph in there.graphs.items()}
    digest = there.files[TOKENIZER].sha256 if TOKENIZER in there.files else None
    same = digest == (None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest())
    plain = replace(there, graphs=graphs, files={}, outputs=0)
    # A config that went through JSON has lists where tuples were.
    same = same and CANARIES in there.files
    return there if same and _plain(plain) == _plain(planned) else None


def _plain(manifest: Manifest) -> dict[str, Any]:
    fields = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
    return fields | {name: dict(fields[name]) for name in ("layers", "graphs", "files", "made_by")}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # transformers, which not every base needs
            continue
    return found
