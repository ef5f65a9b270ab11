"""What a server without secure aggregation could read from one client's single update of a run.

A client of the run takes one step from the run's global adapter on 1, 2 and 8 of its examples, and
the change of its uploaded factors is all that the attack is given, beside the adapter itself. What
it looks for are the inputs of each adapted linear layer, as `fedlora.privacy.audit.inversion` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedlora.adapter import Adapter, LoraLayer
from fedlora.data import ClientData, draw_batches
from fedlora.errors import DataError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint
from fedlora.flat import RowForm, pack
from fedlora.low_rank import Matrix
from fedlora.nn import load_adapter_into, train_local
from fedlora.nn.inject import lora_modules
from fedlora.privacy.audit import best_match, leading_inputs, seen_through, share_in_span
from fedlora.privacy.clipping import clip
from fedlora.randomness import rng
from fedlora.simulation.threads import one_torch_thread
from fedlora.training import Factor, TrainConfig
from fedlora.world import World, shared_world

__all__ = ["audit_inversion"]

BATCHES = (1, 2, 8)  # examples of the one step
DRAWS = 8  # of noise, over which cosines are averaged: with a few inputs one varies by 0.1
_Inputs = Mapping[str, npt.NDArray[np.float32]]  # by path: (rows, in)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One client's single step, as the attack sees it, and what went in."""

    start: Adapter
    change: Adapter  # of the uploaded factors; the others are as in `start`
    uploaded: frozenset[Factor]
    inputs: _Inputs


def audit_inversion(config: ExperimentConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how well inputs are recovered from one update of this run's method.

    ``{"method", "optimizer", "client", "rows": [...], "words"}``; a row is ``{"stage", "uploaded",
    "examples", "step", "noised", "layers", "layer", "cosine", "median_cosine", "span", "chance"}``.
    stage: "first round", or "next round" from the run's adapter. step: "gradient" (one plain step)
    or the run's own optimizer. noised: whether the update is clipped and noised as the run's sum
    is. cosine: between the best reconstruction and the nearest true input, in the layer where it is
    best, the mean over draws of the noise. chance: the same for a change that is noise alone.

    Raises `DataError` where no linear layer is adapted, or no client has enough examples.
    """
    method = config.federation.build_method()
    world = shared_world(
        config.base, config.data, config.lora, config.seed, config.engine.checkpointing
    )
    linear = [path for path, layer in world.initial.layers.items() if layer.kind == "linear"]
    if not linear:
        raise DataError("inversion: expected an adapted linear layer, found none")
    client = _client(world, checkpoint)
    stages = [("first round", 0, world.initial)]
    if checkpoint.state.round:
        stages.append(("next round", checkpoint.state.round, checkpoint.state.trainable))
    rows: list[dict[str, Any]] = []
    with one_torch_thread():
        for stage, done, start in stages:
            # A method that takes turns uploads another factor in the round after.
            turns = {method.uploaded(done + n): done + n for n in (2, 1)}
            for uploaded, round in sorted(turns.items(), key=lambda turn: turn[1]):
                for examples in BATCHES:
                    for name, train in _steps(config, examples):
                        step = _take(world, config, client, start, round, examples, train)
                        rows += _rows(config, checkpoint, step, linear, {
                            "stage": stage, "uploaded": sorted(uploaded), "examples": examples,
                            "step": name,
                        })  # fmt: skip
    return {
        "method": method.name,
        "optimizer": config.federation.train.optimizer,
        "client": client.client_id,
        "rows": rows,
        "words": _words(config, rows),
    }


def _client(world: World, checkpoint: Checkpoint) -> ClientData:
    """Return the first client that takes part and has examples for the largest batch."""
    for client_id in checkpoint.client_ids:
        data = world.data.client(client_id)
        if len(data.train) >= max(BATCHES):
            return data
    raise DataError(f"inversion: expected a client with {max(BATCHES)} examples, found none")


def _steps(config: ExperimentConfig, examples: int) -> Iterator[tuple[str, TrainConfig]]:
    train = replace(config.federation.train, local_steps=1, local_epochs=None, batch_size=examples)
    yield "gradient", replace(train, optimizer="sgd", momentum=0.0, max_grad_norm=None)
    if train.optimizer != "sgd":
        yield train.optimizer, train


def _take(
    world: World,
    config: ExperimentConfig,
    client: ClientData,
    start: Adapter,
    round: int,
    examples: int,
    train: TrainConfig,
) -> _Step:
    method = config.federation.build_method()
    some = client.train.take(list(range(examples)))
    load_adapter_into(world.model, start)
    batches = draw_batches(some, train, config.seed, client.client_id, round)
    with _listening(world.model) as inputs:
        after = train_local(
            world.model, batches, train, task=world.task, rule=method.rule(round),
            seed=config.seed,
        ).adapter  # fmt: skip
    layers = {}
    for path, layer in after.layers.items():
        before = start[path]
        layers[path] = LoraLayer(
            layer.A - before.A, layer.B - before.B, layer.scaling, None, layer.kind
        )
    change = replace(after, layers=layers)
    return _Step(start, change, method.uploaded(round), dict(inputs))


@contextmanager
def _listening(model: nn.Module) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    """Yield the last inputs ``(rows, in)`` of each adapted linear layer, by its path."""
    found: dict[str, npt.NDArray[np.float32]] = {}

    def listen(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().cpu().numpy()
            found[path] = seen.reshape(-1, seen.shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(listen(path))
        for path, module in lora_modules(model).items()
        if module.kind == "linear"
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rows(
    config: ExperimentConfig,
    checkpoint: Checkpoint,
    step: _Step,
    linear: list[str],
    about: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield what is recovered from the update as it is, and as it would be with the run's noise."""
    form = RowForm.of(step.change, step.uploaded)
    row = pack(step.change, form.segments)
    length = float(np.linalg.norm(row)) or 1.0
    draws = rng(config.seed, "inversion", about["examples"]).standard_normal((2, DRAWS, len(row)))
    # Noise as long as the update: what the attack finds in anything at all.
    unrelated = [draw * (length / np.linalg.norm(draw)) for draw in draws[0]]
    chance = _attack(step, form, unrelated, linear)[0]
    seen: list[tuple[bool, list[Matrix]]] = [(False, [row.astype(np.float64)])]
    if config.privacy is not None and checkpoint.privacy is not None:
        norm, multiplier = checkpoint.privacy.clipping_norm, checkpoint.privacy.noise_multiplier
        seen.append((True, [clip(row, norm) + multiplier * norm * draw for draw in draws[1]]))
    for noised, updates in seen:
        cosines, spans = _attack(step, form, updates, linear)
        best = max(cosines, key=lambda path: cosines[path])
        yield {
            **about, "noised": noised, "layers": len(linear), "layer": best,
            "inputs": len(step.inputs[best]),
            "cosine": round(cosines[best], 4),
            "median_cosine": round(median(cosines.values()), 4),
            "span": round(max(spans.values()), 4),
            "chance": round(max(chance.values()), 4),
        }  # fmt: skip


def _attack(
    step: _Step, form: RowForm, updates: Sequence[Matrix], linear: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return by layer the best cosine with an input, and the inputs' share in the row space.

    Both are means over `updates` ``(n,)``, which differ in their noise.
    """
    cosines, spans = dict.fromkeys(linear, 0.0), dict.fromkeys(linear, 0.0)
    for update in updates:
        seen = form.read(update.astype("<f4").tobytes())
        for path in linear:
            inputs, layer = step.inputs[path], seen[path]
            recovered = [np.zeros((1, inputs.shape[1]))]
            if "A" in step.uploaded:
                recovered.append(leading_inputs(layer.A))
                spans[path] += share_in_span(layer.A, inputs) / len(updates)
            if "B" in step.uploaded:
                recovered.append(seen_through(step.start[path].A, leading_inputs(layer.B)))
            cosines[path] += best_match(np.concatenate(recovered), inputs) / len(updates)
    return cosines, spans


def _words(config: ExperimentConfig, rows: list[dict[str, Any]]) -> str:
    """Say what was done and what follows, in one paragraph."""
    clear = [row for row in rows if not row["noised"]]
    worst = max(clear, key=lambda row: float(row["cosine"]))
    text = (
        f"From one update of one step, as {config.federation.method} sends it, the best guess at "
        f"an input of layer {worst['layer']} has cosine {worst['cosine']:.3f} with it "
        f"({worst['examples']} examples, {worst['stage']}, {worst['step']}; from noise alone "
        f"{worst['chance']:.3f}). "
    )
    if noised := [row for row in rows if row["noised"]]:
        most = max(noised, key=lambda row: float(row["cosine"]))
        text += (
            f"With this run's clipping and noise on that one update, the best cosine is "
            f"{most['cosine']:.3f} (from noise alone {most['chance']:.3f}). "
        )
        if config.privacy is not None and config.privacy.mechanism == "central":
            text += (
                "The noise of central privacy is added by the server, to the sum: the server "
                "itself sees the update as it was sent, unless aggregation is secure. "
            )
    return text + (
        "This is one attack on single steps: a client that takes more steps, or has larger "
        "batches, sends a mixture, which is harder to read and not safe."
    )
