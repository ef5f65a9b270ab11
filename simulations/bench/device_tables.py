"""The device's results as Markdown, and what is required beside what was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from simulations.bench.tables import spread, table

__all__ = ["device_tables", "ratio"]

Result = dict[str, Any]
MEGABYTE = 1e6
SIDES = {
    "torch": "torch, eager",
    "fast": "device, fast",
    "low": "device, low memory",
    "int8": "device, int8",
    "int8-low": "device, int8, low memory",
    "int8-backward": "device, int8 in the backward pass",
    "int8-backward-low": "device, int8 in the backward pass, low memory",
    "int8-training": "device, int8 throughout",
    "int8-training-low": "device, int8 throughout, low memory",
    "base": "device, base alone",
    "adapter": "device, base + adapter",
    "merged": "device, merged",
}
# (case, side, what, at most so many times as much as torch)
LIMITS = (
    ("train-minilm", "fast", "time", 1.0),
    ("train-minilm", "low", "memory", 0.6),
    ("train-minilm", "int8-low", "memory", 0.35),
    ("train-smollm2", "fast", "time", 1.0),
    ("train-smollm2", "low", "time", 1.1),
    ("train-smollm2", "low", "memory", 0.65),
    ("train-smollm2", "int8-backward", "time", 0.8),
    ("train-smollm2", "int8-training", "time", 0.6),
    ("train-smollm2", "int8-training-low", "time", 0.6),
    ("train-smollm2", "int8-training-low", "memory", 0.5),
)


def device_tables(results: Sequence[Result]) -> str:
    """Return every table that has rows, with a heading each."""
    makers: tuple[tuple[str, str, Callable[[list[Result]], str]], ...] = (
        ("Training: one step", "train", _train_table),
        ("Inference: one batch of 32 tokens a row", "infer", _infer_table),
        ("Bundles", "infer", _file_table),
        ("Adapters", "adapters", _adapter_table),
        ("One process for inference and training", "mapping", _mapping_table),
        ("Losses of 20 steps", "loss", _loss_table),
        ("An int8 base on held-out data", "metric", _metric_table),
    )
    parts = []
    for title, kind, make in makers:
        if of_kind := [result for result in results if result["kind"] == kind]:
            parts.append(f"### {title}\n\n{make(of_kind)}")
    if rows := list(_required(results)):
        header = ("what", "required", "reached", "")
        parts.append(f"### Required and reached\n\n{table(header, rows)}")
    loads = [result["load"] for result in results if "load" in result]
    if loads:
        threads = results[0]["threads"]
        parts.append(
            f"Threads of a side: {threads}. Load average while measuring: {min(loads):.1f} to "
            f"{max(loads):.1f}. Medians, lowest to highest in brackets; ratios turn by turn, of "
            "CPU time."
        )
    return "\n\n".join(parts)


def ratio(times: Result, one: str, other: str, kind: str = "cpu") -> list[float]:
    """Return how many times as long `one` takes as `other`, turn by turn."""
    return [a / b for a, b in zip(times[one][kind], times[other][kind], strict=True)]


def _train_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        sides, memory = result["sides"], result.get("memory", {})
        for name in sides:
            used = memory.get(name)
            rows.append(
                (
                    "{} {}x{}".format(result["base"], *result["shape"]),
                    SIDES[name],
                    *_times(sides, name, "torch"),
                    f"{used['peak'] / MEGABYTE:.0f}" if used else "–",
                    f"{used['peak'] / memory['torch']['peak']:.2f}" if used else "–",
                    f"{used['anonymous'] / MEGABYTE:.0f}" if used else "–",
                )
            )
    header = ("base, batch", "side", "wall ms", "CPU ms", "ratio to torch", "peak RSS MB",
              "ratio to torch", "anonymous MB")  # fmt: skip
    return table(header, rows)


def _infer_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        for batch, sides in result["batches"].items():
            differences = result["differences"][batch]
            for name in sides:
                if name in differences:
                    difference = f"{differences[name] / differences['largest logit']:.1e}"
                else:
                    difference = "–"
                merged = "–"
                if "merged" in sides:
                    merged = spread(ratio(sides, name, "merged"))
                rows.append(
                    (
                        result["base"], batch, SIDES[name], *_times(sides, name, "torch"),
                        merged, difference,
                    )
                )  # fmt: skip
    header = ("base", "batch", "side", "wall ms", "CPU ms", "ratio to torch", "ratio to merged",
              "difference to torch, of the largest logit")  # fmt: skip
    return table(header, rows)


def _times(sides: Result, name: str, other: str) -> tuple[str, str, str]:
    wall, cpu = ([second * 1e3 for second in sides[name][kind]] for kind in ("wall", "cpu"))
    return spread(wall), spread(cpu), spread(ratio(sides, name, other))


def _file_table(results: Iterable[Result]) -> str:
    rows = [
        (
            result["base"],
            variant,
            f"{files['base.onnx.data'] / MEGABYTE:.1f}",
            ", ".join(
                f"{name.removesuffix('.onnx')} {size / MEGABYTE:.2f}"
                for name, size in files.items()
                if name.endswith(".onnx")
            ),
            f"{result['export_cpu'][variant]:.0f}",
        )
        for result in results
        for variant, files in result["files"].items()
    ]
    return table(("base", "variant", "weights MB", "graphs MB", "export, CPU s"), rows)


def _adapter_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        for name, (middle, low, high) in result["us"].items():
            rows.append((result["base"], name, f"{middle:.2f} ({low:.2f}–{high:.2f}) µs"))
        requests = result["requests"]
        for name in ("one", "two"):
            rate = requests["count"] / requests["cpu"][name]
            what = f"{requests['count']:,} mixed requests, adapters: {name}"
            rows.append((result["base"], what, f"{rate:.0f} a CPU second"))
        rows.append(
            (result["base"], "throughput of two / one, by blocks", spread(requests["ratio_cpu"]))
        )
        for codec in ("fp32", "int8"):
            size = f"{result[f'{codec}_file_bytes'] / 1e3:.0f} kB"
            rows.append((result["base"], f"file of the adapter, {codec}", size))
    note = "Of single calls: the median of their wall time, 5th to 95th percentile in brackets."
    return f"{table(('base', 'what', 'measured'), rows)}\n\n{note}"


def _mapping_table(results: Iterable[Result]) -> str:
    rows = [
        (
            result["base"],
            side,
            f"{used['peak'] / MEGABYTE:.0f}",
            f"{used['anonymous'] / MEGABYTE:.0f}",
            f"{used['file'] / MEGABYTE:.0f}",
            str(used["mappings"]),
            f"{used['weights'] / MEGABYTE:.0f}",
        )
        for result in results
        for side, used in result["memory"].items()
    ]
    header = ("base", "sessions", "peak RSS MB", "anonymous MB", "of files MB",
              "mappings of the weights", "weights MB")  # fmt: skip
    return table(header, rows)


def _loss_table(results: Iterable[Result]) -> str:
    rows = [
        (
            result["base"],
            SIDES[name],
            f"{result['losses'][name][0]:.4f}",
            f"{result['losses'][name][-1]:.4f}",
            f"{difference:.1e}",
        )
        for result in results
        for name, difference in result["difference"].items()
    ]
    header = ("base", "side", "first loss", "last loss", "largest difference to torch")
    return table(header, rows)


def _metric_table(results: Iterable[Result]) -> str:
    rows, notes = [], []
    for result in results:
        scores = result["scores"]
        for measure in scores["fp32"]:
            one, other = scores["fp32"][measure], scores["int8"][measure]
            rows.append(
                (result["base"], measure, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
            )
        note = (
            f"{result['base']}: {result['steps']:,} steps on many persons' messages, "
            f"{result['examples']:,} held-out messages of all of them"
        )
        if changed := result.get("paired"):
            note += (
                f"; the most frequent class is {result['most_frequent']:.4f} of them; int8 changed "
                f"{changed['changed']:,} predictions, {changed['better']:,} to right and "
                f"{changed['worse']:,} to wrong; standard error of the change of accuracy "
                f"{changed['error']:.4f}"
            )
        notes.append(f"{note}.")
    metrics = table(("base", "measure", "fp32", "int8", "change"), rows)
    return "\n".join([metrics, "", *notes])


def _required(results: Sequence[Result]) -> Iterable[tuple[str, str, str, str]]:
    found = {result["case"]: result for result in results}
    for name, side, what, limit in LIMITS:
        measured = found.get(name, {"sides": {}})
        if what == "time" and side in measured["sides"]:
            value = median(ratio(measured["sides"], side, "torch"))
            yield _most(f"{name}, {SIDES[side]}: CPU time / torch's", limit, value)
        memory = measured.get("memory", {})
        if what == "memory" and side in memory:
            value = memory[side]["peak"] / memory["torch"]["peak"]
            yield _most(f"{name}, {SIDES[side]}: peak RSS / torch's", limit, value)
    if result := found.get("infer-minilm"):
        sides = result["batches"]["8"]
        if "merged" in sides:
            value = median(ratio(sides, "adapter", "merged"))
            yield _most("infer-minilm, batch 8: base + adapter / merged", 1.05, value)
        if "int8" in sides:
            value = median(ratio(sides, "int8", "adapter"))
            yield _most("infer-minilm, batch 8: int8 / fp32", 0.5, value)
    if result := found.get("metric-minilm"):
        change = result["scores"]["int8"]["accuracy"] - result["scores"]["fp32"]["accuracy"]
        yield _most("metric-minilm: change of accuracy, points", 0.5, abs(change) * 100)
    if result := found.get("adapters-minilm"):
        us = {name: values[0] for name, values in result["us"].items()}
        yield _most("swap of a loaded adapter, µs", 20, us["swap of a loaded one"])
        file = us["load from a file, checks and SHA-256, fp32"]
        yield _most("swap from a file, checks and SHA-256, ms", 2, file / 1e3)
        value = median(result["requests"]["ratio_cpu"])
        yield _verdict("throughput of two adapters in turn / one", "≥ 0.9", value, value >= 0.9)
    for name, result in found.items():
        if result["kind"] == "loss":
            value = result["difference"]["fast"]
            yield _most(f"{name}: largest difference over 20 steps", 5e-5, value)
        if result["kind"] == "mapping":
            counts = {side: used["mappings"] for side, used in result["memory"].items()}
            value = counts.get("both", 0)
            yield _verdict(f"{name}: mappings of the weights", "1", value, value == 1)


def _most(what: str, limit: float, value: float) -> tuple[str, str, str, str]:
    return _verdict(what, f"≤ {limit:g}", value, value <= limit)


def _verdict(what: str, limit: str, value: float, holds: bool) -> tuple[str, str, str, str]:
    return (
        what,
        limit,
        f"{value:.2g}" if value < 1e-2 else f"{value:.3g}",
        "" if holds else "**not reached**",
    )
