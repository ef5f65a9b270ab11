"""From per-client rows to what a run reports: summary.json and the table.

A row is ``{"client", "held_out", "rounds", "global": its fingerprint, "scores": {adapter: {measure:
value}}}``, with "kept_global" (whether) where clients keep the better adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig, FederationConfig
from fedlora.federation.checkpoint import Checkpoint, RoundRecord
from fedlora.federation.folder import SUMMARY
from fedlora.federation.guarantee import privacy_line
from fedlora.federation.guard import ADAPTERS
from fedlora.federation.limits import DECLINED
from fedlora.metrics import gain, share_better, summarize

__all__ = [
    "ADAPTERS",
    "codec_bytes",
    "cross_matrix",
    "results",
    "run_notes",
    "run_summary",
    "run_table",
    "table",
]

Row = Mapping[str, Any]


def results(rows: Sequence[Row], *, metric: str, higher_is_better: bool) -> dict[str, Any]:
    """Return the part of summary.json that the clients' rows decide.

    Raises `DataError` without any row of a client that took part.
    """
    taking_part = [row for row in rows if not row["held_out"]]
    held_out = [row for row in rows if row["held_out"]]
    pick = {name: _column(taking_part, name, metric) for name in ADAPTERS}
    better = {"higher_is_better": higher_is_better}
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "clients": len(taking_part),
        **_summaries(taking_part, metric, higher_is_better),
        "held_out": _summaries(held_out, metric, higher_is_better) if held_out else None,
        "share_improved": share_better(pick["global"], pick["personal"], **better),
        "extra": {
            "gain_global_over_base": gain(pick["base"], pick["global"], **better).as_dict(),
            "gain_personal_over_global": gain(pick["global"], pick["personal"], **better).as_dict(),
            "held_out_clients": len(held_out),
            "measures": _measures(taking_part),
            "held_out_measures": _measures(held_out) if held_out else None,
            **_kept(taking_part, held_out),
        },
    }


def no_results(*, metric: str, higher_is_better: bool) -> dict[str, Any]:
    """Return what stands in place of `results` where clients may tell nothing: None and zero."""
    return {
        "metric": metric, "higher_is_better": higher_is_better, "clients": 0,
        **dict.fromkeys(ADAPTERS), "held_out": None, "share_improved": None, "extra": {},
    }  # fmt: skip


def codec_bytes(config: FederationConfig, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return ``{"codecs": ...}``: what the run's bytes are and would be in fp32; {} where they are.

    Shares are of all bytes of the rounds' messages, layouts and settings included. They are None
    where nothing travelled.
    """
    if config.upload_codec == config.download_codec == "fp32":
        return {}
    found: dict[str, Any] = {}
    for way, codec in (("up", config.upload_codec), ("down", config.download_codec)):
        total = sum(getattr(record, f"bytes_{way}") for record in rounds)
        plain = sum(record.fp32_bytes.get(way, 0) for record in rounds)
        share = round(total / plain, 4) if plain else None
        found[way] = {"codec": codec, "bytes": total, "fp32_bytes": plain, "share": share}
    return {"codecs": found}


def run_summary(
    config: ExperimentConfig,
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    rounds: Sequence[RoundRecord],
    *,
    metric: str,
    higher_is_better: bool,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return summary.json, all but its notes and seconds; rows of clients that failed count not.

    No rows at all: nobody was to tell any.
    privacy: of `fedlora.federation.guarantee.privacy_summary`.
    """
    measured: dict[str, Any] = {"metric": metric, "higher_is_better": higher_is_better}
    if rows:
        measured = results([row for row in rows if "scores" in row], **measured)
    else:
        measured = no_results(**measured)
    found = {
        "name": config.name,
        "rounds": checkpoint.state.round,
        **measured,
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "seed": config.seed,
        "fedlora_version": __version__,
        "privacy": None if privacy is None else dict(privacy),
    }
    found["extra"] |= codec_bytes(config.federation, rounds)
    return found


def run_notes(
    checkpoint: Checkpoint, rounds: Sequence[RoundRecord], rows: Sequence[Row], untested: int
) -> list[str]:
    """Return what a reader of the result must know of clients that it does not hold."""
    notes = []
    if out := checkpoint.left_out:
        notes.append(f"{len(out)} clients were left out from the start; {out[0].reason}")
    told = [dropped for record in rounds for dropped in record.dropped]
    if lost := [dropped for dropped in told if not dropped.reason.startswith(DECLINED)]:
        notes.append(f"{len(lost)} replies did not count; the last: {lost[-1].reason}")
    if declined := len(told) - len(lost):
        notes.append(f"{declined} times a device declined to take part in a round")
    if untested:
        notes.append(f"{untested} clients without held-out examples are not evaluated")
    return notes + [f"not in the means: {row['failed']}" for row in rows if "failed" in row]


def cross_matrix(
    clients: Sequence[str], values: Sequence[Sequence[float]], *, higher_is_better: bool
) -> dict[str, Any]:
    """Return everyone's own adapter on everyone's data: ``values[i][j]`` is adapter i on client j.

    `own_beats_others` counts the clients on whose data their own adapter is strictly better than
    the mean of the others' adapters.
    """
    sign = 1 if higher_is_better else -1
    wins = 0
    for j in range(len(clients)):
        others = [row[j] for i, row in enumerate(values) if i != j]
        wins += bool(others) and sign * values[j][j] > sign * sum(others) / len(others)
    return {
        "clients": list(clients),
        "values": [list(row) for row in values],
        "own_beats_others": wins,
    }


def run_table(out: Path) -> str:
    """Return `table` of a finished run's folder. Raises `RunError` when there is no summary."""
    path = out / SUMMARY
    try:
        return table(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path}: no results of a finished run: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a run's summary: {error!r}") from None


def table(summary: Mapping[str, Any]) -> str:
    """Return the run's result as text, one line an adapter."""
    measure = _LABELS.get(summary["metric"], summary["metric"])
    if summary["global"] is None:
        lines = [
            f"{summary['clients']} clients, {summary['rounds']} rounds: no client tells scores"
        ]
        return "\n".join(lines + _last_lines(summary))
    lines = [_head(f"{summary['clients']} clients", measure, summary["extra"]["measures"])]
    lines += _lines(summary, summary["metric"], summary["extra"]["measures"])
    if summary["held_out"]:
        count, measures = (
            summary["extra"]["held_out_clients"],
            summary["extra"]["held_out_measures"],
        )
        lines += ["", _head(f"{count} held-out clients", measure, measures)]
        lines += _lines(summary["held_out"], summary["metric"], measures)
    lines.append("")
    for words, key in _GAINS:
        found = summary["extra"][key]
        interval = "one client: no interval"
        if found["low"] is not None:
            interval = f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}, paired"
        lines.append(f"{words}: {found['mean']:+.4f} {summary['metric']} ({interval})")
    lines.append(f"personal better than global for {summary['share_improved']:.1%} of the clients")
    if (kept := summary["extra"].get("kept_global")) is not None:
        lines.append(
            f"personal is the global adapter, which did better in validation, for {kept} of "
            f"{summary['clients']} clients"
        )
    if cross := summary["extra"].get("cross"):
        lines.append(
            f"own adapter better than the mean of the others' on its person's data: "
            f"{cross['own_beats_others']} of {len(cross['clients'])} clients"
        )
    return "\n".join(lines + _last_lines(summary))


def _last_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    if (privacy := summary.get("privacy")) is not None:
        lines.append(privacy_line(privacy))
        lines += [f"note: {note}" for note in privacy["notes"]]
    return lines + [f"note: {note}" for note in summary["extra"].get("notes", ())]


_LABELS = {
    "loss": "loss",
    "bits_per_character": "bits/char",
    "perplexity": "perplexity",
    "top1": "top-1",
    "top3": "top-3",
    "accuracy": "accuracy",
}
_GAINS = (
    ("global better than base by", "gain_global_over_base"),
    ("personal better than global by", "gain_personal_over_global"),
)
_SHARES = ("accuracy", "top1", "top3")


def _column(rows: Sequence[Row], adapter: str, measure: str) -> list[float]:
    return [row["scores"][adapter][measure] for row in rows]


def _kept(taking_part: Sequence[Row], held_out: Sequence[Row]) -> dict[str, int]:
    """How many keep the global adapter; nothing where that was not asked."""
    if not any("kept_global" in row for row in taking_part):
        return {}
    return {
        "kept_global": sum(row.get("kept_global", False) for row in taking_part),
        "held_out_kept_global": sum(row.get("kept_global", False) for row in held_out),
    }


def _summaries(rows: Sequence[Row], metric: str, higher_is_better: bool) -> dict[str, Any]:
    return {
        name: summarize(
            _column(rows, name, metric),
            _column(rows, name, "loss"),
            higher_is_better=higher_is_better,
        ).as_dict()
        for name in ADAPTERS
    }


def _measures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the mean over clients of every measure, by adapter."""
    names = rows[0]["scores"]["base"]
    return {
        adapter: {name: sum(_column(rows, adapter, name)) / len(rows) for name in names}
        for adapter in ADAPTERS
    }


def _shown(measures: Mapping[str, Mapping[str, float]]) -> list[str]:
    known = [name for name in _LABELS if name in measures["base"]]
    return known + [name for name in measures["base"] if name not in _LABELS]


def _head(who: str, metric: str, measures: Mapping[str, Mapping[str, float]]) -> str:
    columns = [f"{metric} mean", "median", "worst tenth"]
    columns += [_LABELS.get(name, name) for name in _shown(measures) if name != metric]
    return f"{who:<22}" + "".join(f"{name:>15}" for name in columns)


def _lines(
    summaries: Mapping[str, Any], metric: str, measures: Mapping[str, Mapping[str, float]]
) -> list[str]:
    lines = []
    for adapter in ADAPTERS:
        found = summaries[adapter]
        cells = [f"{found[key]:.4f}" for key in ("mean", "median", "worst_tenth")]
        for name in _shown(measures):
            if name != metric:
                value = measures[adapter][name]
                cells.append(f"{value:.2%}" if name in _SHARES else f"{value:.4f}")
        lines.append(f"{adapter:<22}" + "".join(f"{cell:>15}" for cell in cells))
    return lines
