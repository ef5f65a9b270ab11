"""What a smaller release costs people: personal adapters that start from fp16 and int8 globals.

A global adapter of tiny-chat is trained on the messages of some people, and released as fp32, fp16
and int8. Others train their own from each, with the same steps on the same batches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from fedlora.adapter import Adapter
from fedlora.data import Examples, draw_batches, load_data
from fedlora.device.scoring import evaluate
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.export.bundle import export_bundle
from fedlora.formats.packed import decode_packed, encode_packed
from fedlora.formats.tensors import parse_tensors
from fedlora.training import TrainConfig

pytestmark = pytest.mark.slow
TRAINING = TrainConfig(local_steps=24, learning_rate=2e-3, batch_size=8)
PEOPLE, TEACHERS = 12, 12


def joined(parts: list[Examples]) -> Examples:
    """All examples of some people, short ones padded: rows of 0, targets that are not counted."""
    width = max(part.inputs.shape[1] for part in parts)

    def wide(array: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    inputs = np.concatenate([wide(part.inputs, 0) for part in parts])
    return Examples(inputs, np.concatenate([wide(part.targets, -100) for part in parts]))


def test_personal_adapters_from_small_releases_are_as_good(tmp_path: Path) -> None:
    export_bundle("tiny-chat", tmp_path / "bundle", train=["8x32", "8x64"])
    session = Session(tmp_path / "bundle")
    trainer = Trainer(session.bundle)
    data = load_data("chitchat", task="next-token", tokenizer=session.bundle.tokenizer(),
                     test_share=0.2, max_length=64)  # fmt: skip
    people = [data.client(client) for client in data.client_ids]
    pooled = joined([person.train for person in people[:TEACHERS]])
    steps = TrainConfig(local_steps=120, learning_rate=2e-3, batch_size=8)
    trained = trainer.fit(draw_batches(pooled, steps, 0, "pooled", 1), steps, seed=0).adapter

    found: dict[str, list[dict[str, float]]] = {}
    for codec in ("fp32", "fp16", "int8"):
        data_of = encode_packed(trained, codec=codec)
        start: Adapter = decode_packed(parse_tensors(data_of)).adapter
        for number, person in enumerate(people[TEACHERS : TEACHERS + PEOPLE]):
            batches = draw_batches(person.train, TRAINING, 0, str(number), "personal")
            session.swap(trainer.fit(batches, TRAINING, init=start, seed=0).adapter)
            found.setdefault(codec, []).append(evaluate(session, person.test))
    session.swap(None)
    base = np.mean(
        [evaluate(session, p.test)["loss"] for p in people[TEACHERS : TEACHERS + PEOPLE]]
    )
    means = {
        codec: {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        for codec, rows in found.items()
    }
    for codec, values in means.items():
        print(codec, {name: round(value, 5) for name, value in values.items()}, f"base {base:.4f}")
    assert means["fp32"]["loss"] < base - 0.05  # there is something to lose
    for codec in ("fp16", "int8"):
        for name in ("top1", "top3"):
            assert means[codec][name] == pytest.approx(means["fp32"][name], abs=0.005)
        # 0.5 % of the loss, where a word is the unit of the two above.
        assert means[codec]["loss"] == pytest.approx(means["fp32"]["loss"], rel=0.005)
