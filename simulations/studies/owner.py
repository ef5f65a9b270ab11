"""Is it the owner? Recognizing a watch's wearer by an adapter, from a finished run of `watch`.

    fedlora simulate watch --out runs/watch
    python -m simulations.studies.owner runs/watch

An adapter that knows how its person moves should be less surprised by this person than by others.
For each client (a person's wrist) every test window of the owner, and of the same wrist of the four
other persons, is scored with the base, the global and the owner's personal adapter; the AUC is the
probability that a window of the owner scores higher than one of another person. The other wrist
would be told apart by its mirrored axes alone, and is left out. A person's AUC is the mean of both
wrists', and intervals are over persons.

Scores, of one window of two seconds, higher for a more familiar one:
known     log probability of the exercise that was done: the watch has prescribed it. The main one.
unknown   log probability of the likeliest exercise: nothing is known of the window.
gain      `known` minus the base's `known`: what is hard for everyone counts for nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch

from fedlora.adapter import Adapter
from fedlora.experiment import ExperimentConfig
from fedlora.files import write_atomic
from fedlora.formats import load_adapter
from fedlora.metrics import Gain, auc, gain
from fedlora.nn.outputs import logits_of
from fedlora.nn.serving import serving
from fedlora.world import World, open_world

__all__ = ["ADAPTERS", "SCORES", "owner_aucs", "page", "person_aucs", "window_scores"]

ADAPTERS = ("base", "global", "personal")
SCORES = ("known", "unknown", "gain")
PAGE = Path(__file__).parent / "owner.md"

Scores = npt.NDArray[np.float64]
Aucs = Mapping[tuple[str, str], Mapping[str, float]]  # (score, adapter) -> person -> AUC


def owner_aucs(folder: Path) -> Aucs:
    """Return each person's AUC by score and adapter, from the adapters in a run's folder."""
    config = ExperimentConfig.from_toml(folder / "experiment.toml")
    world = open_world(config.base, config.data, config.lora, config.seed)
    shared = load_adapter(folder / "adapter.safetensors")
    scored: dict[tuple[str, str], dict[str, dict[str, Scores]]] = {}
    plain = _all_windows(world, world.initial)
    of_all = _all_windows(world, shared)
    for owner in world.data.client_ids:
        mine = load_adapter(folder / "personal" / f"{quote(owner, safe='')}.safetensors")
        found = {"base": plain, "global": of_all, "personal": _all_windows(world, mine)}
        for adapter, windows in found.items():
            for score in SCORES:
                if (score, adapter) == ("gain", "base"):
                    continue
                scored.setdefault((score, adapter), {})[owner] = {
                    client: values["known"] - plain[client]["known"]
                    if score == "gain"
                    else values[score]
                    for client, values in windows.items()
                }
    return {name: person_aucs(by_owner) for name, by_owner in scored.items()}


def person_aucs(by_owner: Mapping[str, Mapping[str, Scores]]) -> dict[str, float]:
    """Return the AUC of each person, the mean over wrists.

    by_owner: for each owner, ``person_wrist``, the scores of all clients' windows with what the
    owner is served.
    """
    found: dict[str, list[float]] = {}
    for owner, scores in by_owner.items():
        person, wrist = owner.split("_")
        others = [
            values
            for client, values in scores.items()
            if client.split("_")[0] != person and client.split("_")[1] == wrist
        ]
        value = auc(list(scores[owner]), list(np.concatenate(others)))
        found.setdefault(person, []).append(value)
    return {person: float(np.mean(values)) for person, values in sorted(found.items())}


def window_scores(logits: npt.ArrayLike, targets: npt.ArrayLike) -> dict[str, Scores]:
    """Return "known" and "unknown" of windows (n,), from logits (n, classes), targets (n,)."""
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=1, keepdims=True)
    logs = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return {"known": logs[np.arange(len(logs)), np.asarray(targets)], "unknown": logs.max(axis=1)}


def page(aucs: Aucs, config: ExperimentConfig) -> str:
    """Return the study's page in Markdown."""
    persons = list(aucs["known", "base"])
    lines = [
        "# Is it the owner?",
        "",
        (
            f"AUC for telling a two-second window of a watch's owner from windows of "
            f"{len(persons) - 1} other persons (same wrist, same exercises, held-out windows of "
            f"all), by how familiar it is to an adapter; 0.5 is chance. {len(persons)} persons, "
            "each the mean of two wrists; 95 % Student intervals over persons, paired differences. "
            f"Run: `{config.name}`, {config.federation.rounds} rounds of "
            f"{config.federation.method}, {config.personalization.steps} personal steps, seed "
            f"{config.seed}."
        ),
        "",
        "    fedlora simulate watch --out runs/watch",
        "    python -m simulations.studies.owner runs/watch",
        "",
        "Scores: `known` is the log probability of the exercise that was prescribed (chosen as the",
        "main one beforehand); `unknown` that of the likeliest exercise; `gain` is `known` minus",
        "the base's, so that windows which are hard for everyone count for nothing. The base and",
        "the global adapter are one for everyone: they cannot tell who is whom, and their mean is",
        "near 0.5.",
        "",
        "| score | adapter | mean AUC | 95 % interval | " + " | ".join(map(_name, persons)) + " |",
        "|---|---|---|---|" + "---|" * len(persons),
    ]
    for (score, adapter), values in sorted(aucs.items(), key=lambda item: _place(item[0])):
        each = [values[person] for person in persons]
        mean = gain([0.0] * len(each), each, higher_is_better=True)
        cells = " | ".join(f"{value:.3f}" for value in each)
        lines.append(f"| {score} | {adapter} | {mean.mean:.3f} | {_interval(mean)} | {cells} |")
    lines += [
        "",
        "| score | difference | mean | 95 % interval | evidence |",
        "|---|---|---|---|---|",
    ]
    for score in SCORES:
        for before, after in (("base", "global"), ("global", "personal"), ("base", "personal")):
            if (score, before) not in aucs:
                continue
            first, second = (
                [aucs[score, adapter][person] for person in persons] for adapter in (before, after)
            )
            found = gain(first, second, higher_is_better=True)
            lines.append(
                f"| {score} | {after} − {before} | {found.mean:+.3f} | {_interval(found, '+')} | "
                f"{_evidence(found)} |"
            )
    return "\n".join(lines) + "\n"


def _all_windows(world: World, adapter: Adapter) -> dict[str, dict[str, Scores]]:
    """Scores of every client's test windows with one adapter."""
    with torch.no_grad(), serving(world.model, adapter):
        return {
            data.client_id: window_scores(
                logits_of(world.model, torch.tensor(data.test.inputs), masked=True).numpy(),
                data.test.targets,
            )
            for data in world.data.clients()
        }


def _place(key: tuple[str, str]) -> tuple[int, int]:
    return SCORES.index(key[0]), ADAPTERS.index(key[1])


def _name(person: str) -> str:
    return f"person {person}"


def _interval(found: Gain, sign: str = "") -> str:
    return f"{found.low:{sign}.3f} to {found.high:{sign}.3f}"


def _evidence(found: Gain) -> str:
    if found.low > 0:
        return "better"
    return "worse" if found.high < 0 else "none"


def main(folder: str, out: str | Path = PAGE) -> None:
    """Read a run's folder, print the page and write it."""
    run = Path(folder)
    text = page(owner_aucs(run), ExperimentConfig.from_toml(run / "experiment.toml"))
    write_atomic(Path(out), text.encode())
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
