"""From a run's folder straight to a release, through gates that must pass first.

    evaluation   the global adapter is not worse than the base for people who never took part
    norm         each layer's weights change about as much as training changes them
    size         of the packed file

A run that is not finished has a checkpoint and no evaluation yet: it is only released on demand,
and the release says that nobody evaluated it. Everything else that a gate finds is a refusal with
its numbers, and nothing is written.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.adapter import Adapter
from fedlora.errors import ConfigError, GateError, PublishError
from fedlora.formats import load_adapter, read_info
from fedlora.formats.packed import encode_packed

if TYPE_CHECKING:
    from fedlora.ota import Publisher, Release

__all__ = ["Candidate", "Gates", "check_gates", "publish_run", "read_candidate"]

CODEC = "fp16"  # an error of 5e-4 of each number, and half the bytes


@dataclass(frozen=True, slots=True)
class Gates:
    """What a release must not exceed."""

    # Share by which the global adapter may be worse than the base, of the base's mean metric.
    worse: float = 0.0
    # Root mean square of a layer's s·B·A. A base's weights have about 0.02 to 0.2, the bundled
    # experiments change them by 0.002 to 0.024; twenty times that is a run that diverged.
    rms: float = 0.5
    num_bytes: int = 1 << 26  # what a device takes, unless its owner says otherwise

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(
                    f"gates: {field.name}: expected a number of at least 0, found {value}"
                )


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a run offers. summary: summary.json; None: the run is not finished."""

    folder: Path
    adapter: Adapter
    provenance: Mapping[str, Any]
    summary: Mapping[str, Any] | None


def read_candidate(folder: Path, *, unevaluated: bool = False) -> Candidate:
    """Read a run's folder: a finished run, or with `unevaluated` its last checkpoint.

    With `unevaluated` also a finished one whose clients tell no scores.

    Raises `PublishError`, and whatever reading the files does.
    """
    path = folder / "summary.json"
    if path.is_file():
        info = read_info(folder / "adapter.safetensors")
        try:
            summary = json.loads(path.read_bytes())
            untold = summary.get("global", ...) is None
            facts = {"evaluated": None, **_promise(summary)} if untold else _facts(summary)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PublishError(
                f"{path}: expected what fedlora simulate writes, found {error!r:.80}"
            ) from None
        if untold and not unevaluated:
            raise PublishError(
                f"{folder}: on devices a run with privacy tells no scores, so nobody has evaluated "
                "its adapter; release it --unevaluated to a few devices that judge it"
            )
        told = None if untold else summary
        return Candidate(folder, info.adapter, {**info.provenance, **facts}, told)
    if not (folder / "checkpoint" / "state.json").is_file():
        raise PublishError(
            f"{folder}: expected a run with summary.json or a checkpoint, found neither; name the "
            "folder that fedlora simulate or the server wrote"
        )
    if not unevaluated:
        raise PublishError(
            f"{folder}: this run is not finished, so nobody has evaluated its adapter; wait for "
            "its summary.json, or release it --unevaluated to a few devices that judge it"
        )
    from fedlora.federation.checkpoint import read_checkpoint

    state = read_checkpoint(folder).state
    newest = sorted((folder / "checkpoint").glob("round-*[0-9].safetensors"))
    about = read_info(newest[-1]).provenance if newest else {}
    return Candidate(
        folder, state.adapter, {**about, "round": state.round, "evaluated": None}, None
    )


def check_gates(candidate: Candidate, gates: Gates) -> dict[str, Any]:
    """Return what the first two gates measured. Raises `GateError` where one does not open."""
    found: dict[str, Any] = {}
    if candidate.summary is not None:
        found.update(_check_evaluation(candidate.folder, candidate.summary, gates))
    worst = max(candidate.adapter.layers, key=lambda path: _rms(candidate.adapter, path))
    found["largest_rms"] = _rms(candidate.adapter, worst)
    if not found["largest_rms"] <= gates.rms:
        raise GateError(
            f"{candidate.folder}: gate norm: layer {worst!r}: expected weights to change by at "
            f"most {gates.rms:g} (root mean square), found {found['largest_rms']:.3g}; look at the "
            "run's losses, it may have diverged"
        )
    return found


def publish_run(
    folder: Path,
    publisher: Publisher,
    *,
    gates: Gates = Gates(),
    codec: str = CODEC,
    unevaluated: bool = False,
    **about: Any,
) -> tuple[Release, dict[str, Any]]:
    """Release a run's global adapter; return the release, and what the gates measured.

    codec: fp32, fp16, int8 or int4 of the file; the evaluation was of fp32. about: what
    `Publisher.publish` takes. Raises `GateError`, `PublishError` and what reading a run raises.
    """
    candidate = read_candidate(folder, unevaluated=unevaluated)
    found = check_gates(candidate, gates)
    data = encode_packed(candidate.adapter, codec=codec, provenance=candidate.provenance)
    found["num_bytes"] = len(data)
    if len(data) > gates.num_bytes:
        raise GateError(
            f"{folder}: gate size: expected at most {gates.num_bytes:,} bytes, found "
            f"{len(data):,}; take codec int8, or a lower rank"
        )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "adapter.safetensors"
        path.write_bytes(data)
        load_adapter(path)  # what no device could read is not signed
        release = publisher.publish(path, **about)
    return release, found


def _check_evaluation(folder: Path, summary: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    people, means = _people(summary)
    base, new = means["base"]["mean"], means["global"]["mean"]
    gain = (new - base) if summary["higher_is_better"] else (base - new)
    if not gain >= -gates.worse * abs(base):
        raise GateError(
            f"{folder}: gate evaluation: {summary['metric']} of {people}: expected the global "
            f"adapter to be at most {gates.worse:.1%} worse than the base's {base:.4f}, found "
            f"{new:.4f}"
        )
    return {"metric": summary["metric"], "people": people, "base": base, "global": new}


def _people(summary: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return who was evaluated, and their means: people who never took part, if there are any."""
    if summary["held_out"] is not None:
        return f"{summary['extra']['held_out_clients']} held-out clients", summary["held_out"]
    return f"{summary['clients']} clients, none of them held out", summary


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a release says of its run."""
    people, means = _people(summary)
    facts = {
        "evaluated": people,
        "metric": summary["metric"],
        "base": round(means["base"]["mean"], 6),
        "global": round(means["global"]["mean"], 6),
    }
    return facts | _promise(summary)


def _promise(summary: Mapping[str, Any]) -> dict[str, Any]:
    privacy = summary.get("privacy")
    known = privacy if isinstance(privacy, Mapping) else {}
    return {key: known[key] for key in ("epsilon", "delta") if key in known}


def _rms(adapter: Adapter, path: str) -> float:
    layer = adapter.layers[path]
    return float(layer.norm() / math.sqrt(layer.out_features * math.prod(layer.in_shape)))
