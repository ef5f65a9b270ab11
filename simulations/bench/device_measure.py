"""Cases of `simulations.bench.device`, in this process; prints a line of JSON for each.

    python -m simulations.bench.device_measure train-tiny-chat --turns 5

All sides take their turns in one process, one after another, so that what else the machine does
slows them alike; what is compared are the ratios of each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.data import draw_batches, load_data
from fedlora.device.manifest import read_manifest
from fedlora.device.scoring import evaluate
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.randomness import rng
from fedlora.training import TrainConfig
from simulations.bench.device_adapters import measure_adapters
from simulations.bench.device_bundles import Variant, bundle_of, export_seconds, skipped
from simulations.bench.device_cases import ROUNDED, TOKENS, DeviceCase, device_case
from simulations.bench.device_sides import (
    TorchSide,
    adapter_for,
    device_session,
    device_step,
    start_for,
)
from simulations.bench.spent import Spent, spent

__all__ = ["by_turns", "main", "measure", "paired"]

Result = dict[str, Any]
Variants = Sequence[Variant]
VARIANTS: Variants = ("merged", "int8", "int8-backward", "int8-training")
TURN_SECONDS = 0.2  # of one side; short calls are repeated
LOSS_STEPS = 20
METRIC_STEPS, METRIC_EXAMPLES = 600, 10_000


def measure(case: DeviceCase, turns: int, threads: int, only: Variants = VARIANTS) -> Result:
    """Measure one case but its memory, and say how busy the machine was.

    only: the bundles that take part, besides the fp32 one.
    """
    fp32 = bundle_of(case.base_name, "fp32")
    about = {"case": case.name, "kind": case.kind, "base": case.base_name, "threads": threads}
    if fp32 is None:
        return {**about, "skipped": skipped(case.base_name, "fp32")}
    kinds: Mapping[str, Callable[..., Result]] = {
        "train": _train, "infer": _infer, "loss": _loss, "metric": _metric,
        "adapters": _adapters,
    }  # fmt: skip
    found = kinds[case.kind](case, fp32, turns, threads, only)
    return {**about, "load": os.getloadavg()[0], **found}


def by_turns(
    sides: Mapping[str, Callable[[], object]], turns: int, calls: int | None = None
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Return seconds of one call by side ("wall", "cpu"), a number a turn, and the calls a turn.

    Sides change places from turn to turn, so that none always runs behind the same one.
    """
    first = []
    for run in sides.values():
        run()  # opens what is opened at first use
        start = time.process_time()
        run()
        first.append(time.process_time() - start)
    calls = calls or max(1, min(500, round(TURN_SECONDS / max(median(first), 1e-6))))
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    names = list(sides)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds: Spent
            with spent() as seconds:
                for _ in range(calls):
                    sides[name]()
            found[name]["wall"].append(seconds.wall / calls)
            found[name]["cpu"].append(seconds.cpu / calls)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    return found, calls


def _train(case: DeviceCase, fp32: Path, turns: int, threads: int, only: Variants) -> Result:
    manifest = read_manifest(fp32)
    start = start_for(manifest)
    steps = {
        "torch": TorchSide(case.base, manifest, threads).step_from(start),
        "fast": device_step(fp32, start, threads),
        "low": device_step(fp32, start, threads, low_memory=True),
    }
    for variant in ROUNDED:
        if (folder := _other(case, variant, only)) is not None:
            steps[variant] = device_step(folder, start, threads)
            steps[f"{variant}-low"] = device_step(folder, start, threads, low_memory=True)
    batch = case.base.batch(*case.base.bucket)
    losses = {name: step([batch])[0] for name, step in steps.items()}
    # The time of a step: a training of three, less one of one, would be two numbers' noise; the
    # steps of one training share its setting up, as a device's do.
    several = [batch] * 3
    sides = {name: (lambda step=step: step(several)) for name, step in steps.items()}
    times, calls = by_turns(sides, turns)
    for side in times.values():
        for values in side.values():
            values[:] = [value / len(several) for value in values]
    return {
        "sides": times, "calls": calls, "losses": losses, "shape": case.base.bucket,
        "skipped_int8": skipped(case.base_name, "int8"),
    }  # fmt: skip


def _infer(case: DeviceCase, fp32: Path, turns: int, threads: int, only: Variants) -> Result:
    manifest = read_manifest(fp32)
    adapter = adapter_for(case.base_name, manifest)
    torch_side = TorchSide(case.base, manifest, threads)
    torch_side.load(adapter)
    session = device_session(fp32, threads)
    session.add("own", adapter)
    runs: dict[str, Callable[[Any], Any]] = {
        "torch": torch_side.logits,
        "base": lambda x: session.run(x, adapter=None),
        "adapter": lambda x: session.run(x, adapter="own"),
    }
    files: dict[Variant, dict[str, int]] = {"fp32": _sizes(fp32)}
    if (merged := _other(case, "merged", only)) is not None:
        runs["merged"] = device_session(merged, threads).run
        files["merged"] = _sizes(merged)
    if (int8 := _other(case, "int8", only)) is not None:
        small = device_session(int8, threads)
        small.add("own", adapter)
        runs["int8"] = lambda x: small.run(x, adapter="own")
        files["int8"] = _sizes(int8)
    batches, differences = {}, {}
    for rows in (1, 8):
        inputs = case.base.batch(rows, TOKENS, seed=rows)["inputs"]
        logits = {name: run(inputs) for name, run in runs.items() if name != "base"}
        largest = float(np.abs(logits["torch"]).max())
        differences[rows] = {
            name: float(np.abs(found - logits["torch"]).max()) for name, found in logits.items()
        } | {"largest logit": largest}
        sides = {name: (lambda run=run, x=inputs: run(x)) for name, run in runs.items()}
        batches[rows], _ = by_turns(sides, turns)
    return {
        "batches": batches, "differences": differences, "tokens": TOKENS, "files": files,
        "export_cpu": {name: export_seconds(case.base_name, name) for name in files},
        "skipped_int8": skipped(case.base_name, "int8"),
    }  # fmt: skip


def _loss(case: DeviceCase, fp32: Path, turns: int, threads: int, only: Variants) -> Result:
    manifest = read_manifest(fp32)
    start = start_for(manifest)
    side = TorchSide(case.base, manifest, threads)
    batches = _real_batches(case, side.tokenizer, LOSS_STEPS)
    losses = {
        "torch": side.step_from(start)(batches),
        "fast": device_step(fp32, start, threads)(batches),
        "low": device_step(fp32, start, threads, low_memory=True)(batches),
    }
    if (int8 := _other(case, "int8", only)) is not None:
        losses["int8"] = device_step(int8, start, threads)(batches)
    difference = {
        name: max(abs(a - b) for a, b in zip(values, losses["torch"], strict=True))
        for name, values in losses.items()
        if name != "torch"
    }
    return {"losses": losses, "difference": difference, "steps": LOSS_STEPS}


def _metric(case: DeviceCase, fp32: Path, turns: int, threads: int, only: Variants) -> Result:
    """Train on many persons' examples on the fp32 bundle; score held-out ones on either base."""
    int8 = _other(case, "int8", only)
    if int8 is None:
        return {"skipped": skipped(case.base_name, "int8")}
    manifest = read_manifest(fp32)
    data = load_data(
        case.base.data, tokenizer=fp32 / "tokenizer.json", max_length=case.base.bucket[1],
        partition="iid", clients=1,
    )  # fmt: skip
    (everyone,) = data.clients()
    config = TrainConfig(
        local_steps=METRIC_STEPS, batch_size=case.base.bucket[0], learning_rate=2e-3
    )
    batches = draw_batches(everyone.train, config, 0, everyone.client_id, 1)
    trainer = Trainer(fp32, threads=threads)
    trained = trainer.fit(batches, config, init=start_for(manifest)).adapter
    chosen = rng(0, "bench device metric").permutation(len(everyone.test))[:METRIC_EXAMPLES]
    test = everyone.test.take(np.sort(chosen))
    scores, found = {}, {}
    for name, folder in (("fp32", fp32), ("int8", int8)):
        session = device_session(folder, threads)
        session.swap(trained)
        noted = _Noted(session)
        scores[name], found[name] = evaluate(noted, test), noted.likeliest
    result: Result = {"scores": scores, "examples": len(test), "steps": METRIC_STEPS}
    if case.base.classes:
        # `evaluate` takes rows in the order of their lengths.
        targets = test.targets[np.argsort(test.lengths, kind="stable")]
        result["paired"] = paired(
            np.concatenate(found["fp32"]), np.concatenate(found["int8"]), targets
        )
        result["most_frequent"] = float(np.bincount(targets).max() / len(targets))
    return result


class _Noted:
    """A session that keeps the likeliest class of every row that it was asked for."""

    def __init__(self, session: Session) -> None:
        self._session, self.manifest = session, session.manifest
        self.likeliest: list[npt.NDArray[np.int64]] = []

    def run(self, inputs: npt.NDArray[Any]) -> Array:
        logits = self._session.run(inputs)
        self.likeliest.append(logits.argmax(-1))
        return logits


def paired(
    one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Return how predictions (n,) of the same rows differ, and the standard error of the change.

    The error is of the change of accuracy as a share: each row's change is -1, 0 or 1, so its
    variance is (better + worse) / n - change ** 2.
    """
    better = int(((one != targets) & (other == targets)).sum())
    worse = int(((one == targets) & (other != targets)).sum())
    change = (better - worse) / len(targets)
    variance = (better + worse) / len(targets) - change**2
    return {
        "changed": int((one != other).sum()), "better": better, "worse": worse,
        "error": float(np.sqrt(variance / len(targets))),
    }  # fmt: skip


def _adapters(case: DeviceCase, fp32: Path, turns: int, threads: int, only: Variants) -> Result:
    manifest = read_manifest(fp32)
    return measure_adapters(case.base, fp32, manifest, turns, threads)


def _other(case: DeviceCase, variant: Variant, only: Variants) -> Path | None:
    return bundle_of(case.base_name, variant) if variant in only else None


def _real_batches(case: DeviceCase, tokenizer: Any, steps: int) -> list[Any]:
    rows, tokens = case.base.bucket
    data = load_data(case.base.data, tokenizer=tokenizer, max_length=tokens)
    client = data.client(data.client_ids[0])
    config = TrainConfig(local_steps=steps, batch_size=rows)
    return list(draw_batches(client.train, config, 0, client.client_id, 1))


def _sizes(folder: Path) -> dict[str, int]:
    return {name: info.num_bytes for name, info in read_manifest(folder).files.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure the named cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="+")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args(arguments)
    for case in map(device_case, options.case):
        found = measure(case, options.turns, options.threads, options.only)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
