"""What a run promises to its people by its ledger, for summary.json, the table and the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint
from fedlora.privacy import PrivacyConfig
from fedlora.privacy.accounting import accountant_used, neighboring_relation, rounded_up
from fedlora.privacy.ledger import Ledger

__all__ = ["guarantee", "privacy_line", "privacy_summary"]

UNIT = "user"  # all that one client does in the run, not one of its examples


def guarantee(out: Path, config: ExperimentConfig) -> dict[str, Any] | None:
    """Return epsilon and what it means, as a released adapter says it; None without privacy."""
    if config.privacy is None:
        return None
    return _guarantee(Ledger.read(out), config.privacy)


def privacy_summary(
    out: Path, config: ExperimentConfig, checkpoint: Checkpoint
) -> dict[str, Any] | None:
    """Return ``summary.json["privacy"]`` of a run; None without privacy and without secure sums.

    clipping_norm: of the last round. sampling_probability: the largest of a round.
    """
    privacy, state = config.privacy, checkpoint.privacy
    if privacy is None or state is None:
        if config.secure_aggregation is None:
            return None
        notes = [*_secure_notes(config), "sums without noise are no differential privacy"]
        return {"mechanism": None, "secure_aggregation": True, "notes": notes}
    ledger = Ledger.read(out)
    lines, events = ledger.lines, ledger.events()
    sums = [line.clipping_norm for line in lines if line.mechanism != "count"]
    local = privacy.mechanism == "local"
    stopped = checkpoint.state.round < config.federation.rounds
    drawn = {line.event.sampling for line in lines}
    return {
        "mechanism": privacy.mechanism,
        **_guarantee(ledger, privacy),
        "accountant": accountant_used(events, privacy.accountant),
        "clipping_norm": sums[-1] if sums else state.clipping_norm,
        "noise_multiplier": state.noise_multiplier,
        "sampling": "none" if local else "/".join(sorted(drawn)) or config.federation.sampling,
        "sampling_probability": max((event.sampling_probability for event in events), default=0.0),
        "rounds": checkpoint.state.round,
        "stopped": "max_epsilon" if stopped else None,
        "secure_aggregation": config.secure_aggregation is not None,
        "notes": [*_notes(config, checkpoint), *_secure_notes(config)],
    }


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """Return a summary's privacy as one line of the printed table."""
    sums = "the server saw sums of updates, by secure aggregation"
    if privacy["mechanism"] is None:
        return f"privacy: {sums}; no epsilon is promised"
    by = {"central": "by the server", "local": "by each device"}[privacy["mechanism"]]
    drawn = {
        "poisson": f"Poisson {privacy['sampling_probability']:.3g}",
        "fixed": f"fixed cohorts {privacy['sampling_probability']:.3g}",
        "all": "everyone in every round",
        "none": "no amplification",
    }.get(privacy["sampling"], privacy["sampling"])
    ended = "; ended early by max_epsilon" if privacy["stopped"] else ""
    epsilon = rounded_up(privacy["epsilon"], 2)
    return (
        f"privacy: (epsilon {epsilon:.2f}, delta {privacy['delta']:g}) for each person "
        f"({privacy['unit']}), {privacy['neighboring_relation']}, by {privacy['accountant']}; "
        f"noise {by}, multiplier {privacy['noise_multiplier']:.3g}, clipping norm "
        f"{privacy['clipping_norm']:.3g}, {drawn}; {privacy['rounds']} rounds{ended}"
        f"{f'; {sums}' if privacy['secure_aggregation'] else ''}"
    )


def _guarantee(ledger: Ledger, privacy: PrivacyConfig) -> dict[str, Any]:
    return {
        "epsilon": ledger.spent(privacy.delta, privacy.accountant),
        "delta": privacy.delta,
        "unit": UNIT,
        "neighboring_relation": neighboring_relation(ledger.events()),
    }


def _notes(config: ExperimentConfig, checkpoint: Checkpoint) -> list[str]:
    notes = []
    ids = [client.client_id for client in checkpoint.clients]
    people = {client_id.partition("#")[0] for client_id in ids}
    if len(people) < len(ids):
        notes.append(
            f"{len(ids)} virtual users are copies of {len(people)} people: the guarantee is for a "
            "virtual user, and a person with many copies has none of this size"
        )
    if config.privacy is not None and config.privacy.canaries:
        notes.append(
            f"{config.privacy.canaries} invented clients took part as canaries, for an audit: they "
            "are noise to everyone else, and a run that is to be used should have none"
        )
    if config.privacy is not None and config.privacy.delta * len(ids) > 1:
        notes.append(
            f"delta {config.privacy.delta:g} is over one in {len(ids)}, the number of users: it "
            "allows to publish one of them whole"
        )
    return notes


def _secure_notes(config: ExperimentConfig) -> list[str]:
    secure = config.secure_aggregation
    if secure is None:
        return []
    notes = [
        f"the server saw sums of at least {secure.threshold:.0%} of a cohort's updates, and no "
        "single one, if it passed on the devices' own keys: devices with trusted-keys check that"
    ]
    if config.privacy is not None:
        notes.append(
            "whether a round had enough clients for a sum is outside the guarantee: it depends on "
            "who answered, and on nobody's data"
        )
    return notes
