"""Training on bundles of the bundled bases: twenty steps against torch, and a mixed federation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

import fedlora as fl
from clients.app import app as client_app
from fedlora.adapter import Adapter
from fedlora.data import draw_batches, load_data
from fedlora.device.scoring import evaluate as evaluate_on_device
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.evaluation import evaluate
from fedlora.experiment import ExperimentConfig
from fedlora.export.bundle import export_bundle
from fedlora.federation import read_rounds, run_federation
from fedlora.flat import pack, segments_of
from fedlora.nn import beside, get_task, inject_lora, load_adapter_into, load_base, train_local
from fedlora.simulation.grid import InProcessGrid
from fedlora.training import LocalRule, TrainConfig

STEPS = 20
ADAMW = TrainConfig(local_steps=STEPS, learning_rate=3e-3)
SGD = TrainConfig(local_steps=STEPS, learning_rate=0.1, optimizer="sgd")


@dataclass(frozen=True)
class Place:
    """A base in both forms, and one client's data."""

    folder: Path
    model: Any  # with LoRA
    task: str
    data: Any
    client: Any
    start: Adapter  # random, A and B
    frozen: Adapter  # random, of another rank


def _place(folder: Path, base_id: str, lora: Any, train: tuple[str, ...], data_id: str) -> Place:
    base = load_base(base_id)
    task = "classification" if base_id == "watch-cnn" else "next-token"
    data = load_data(data_id, task=task, tokenizer=base.tokenizer, max_length=32)
    manifest = export_bundle(base, folder, lora=lora, train=train)
    inject_lora(base.model, lora, base=base.card.fingerprint)
    random = np.random.default_rng(0)
    layers, frozen = {}, {}
    for path, spec in manifest.layers.items():
        rank = lora.rank
        for found, size, r in ((layers, 0.05, rank), (frozen, 0.1, rank + 2)):
            A = random.normal(0, np.prod(spec.in_shape) ** -0.5, (r, *spec.in_shape))
            B = random.normal(0, size, (spec.out_features, r))
            found[path] = fl.LoraLayer(A, B, 2.0, kind=spec.kind)
    client = data.client(data.client_ids[3])
    start, beside_it = (Adapter(found, lora, manifest.base) for found in (layers, frozen))
    return Place(folder, base.model, task, data, client, start, beside_it)


@pytest.fixture(scope="module", params=["watch-cnn", "tiny-chat"])
def place(request: Any, tmp_path_factory: Any) -> Place:
    folder = tmp_path_factory.mktemp("bundles") / request.param
    if request.param == "watch-cnn":
        lora = fl.LoraConfig(rank=4, lora_alpha=8)
        return _place(folder, "watch-cnn", lora, ("8",), "watch")
    lora = fl.LoraConfig(rank=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    return _place(folder, "tiny-chat", lora, ("8x32",), "chitchat-small")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses_in_torch(
    place: Place, batches: list[Any], config: TrainConfig, frozen: Adapter | None, rule: LocalRule
) -> tuple[list[float], Adapter]:
    """The loss of every step, and what is trained."""
    task = get_task(place.task)
    seen: dict[int, float] = {}

    def loss(model: Any, batch: Any) -> Any:
        value = task.loss(model, batch)
        # The last pass over a batch is the step's: what is tried out before comes before it.
        seen[id(batch)] = float(value.detach())
        return value

    load_adapter_into(place.model, place.start)
    with beside(place.model, frozen):
        watched = replace(task, loss=loss)
        result = train_local(place.model, batches, config, task=watched, rule=rule)
    losses = [seen[id(batch)] for batch in batches]
    assert np.mean(losses) == pytest.approx(result.loss, rel=1e-12)
    return losses, result.adapter


CASES: dict[str, tuple[TrainConfig, bool, LocalRule]] = {
    "adamw": (ADAMW, False, LocalRule()),
    "sgd": (SGD, False, LocalRule()),
    "beside a frozen adapter": (ADAMW, True, LocalRule()),
    "only B": (ADAMW, False, LocalRule(trained=frozenset({"B"}))),
}


# The rules are the trainer's, not the base's: by default the larger base has two, the rest is slow.
@pytest.mark.parametrize(
    ("place", "case"),
    [
        *(("watch-cnn", case) for case in CASES),
        *(("tiny-chat", case) for case in ("adamw", "beside a frozen adapter")),
        *(pytest.param("tiny-chat", case, marks=pytest.mark.slow) for case in ("sgd", "only B")),
    ],
    indirect=["place"],
)
def test_twenty_steps_follow_torch(place: Place, case: str) -> None:
    config, with_frozen, rule = CASES[case]
    frozen = place.frozen if with_frozen else None
    batches = list(draw_batches(place.client.train, config, 0, "someone", 1))
    losses: list[float] = []
    ours = Trainer(place.folder, threads=1).fit(
        batches, config, init=place.start, frozen=frozen, rule=rule,
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    expected, theirs = losses_in_torch(place, batches, config, frozen, rule)
    assert expected[0] != expected[-1]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=5e-5)
    segments = segments_of(theirs, ("A", "B"))
    far = np.abs(pack(ours.adapter, segments) - pack(theirs, segments)).max()
    # A step of AdamW is the learning rate times a ratio, however small the gradients: their
    # rounding is not small beside them everywhere. Twenty steps go up to 0.06.
    assert far <= (1e-5 if config.optimizer == "sgd" else 1e-3)
    moved = np.abs(pack(ours.adapter, segments) - pack(place.start, segments)).max()
    assert moved > 0.01


def test_held_out_examples_score_as_in_torch(place: Place) -> None:
    task = get_task(place.task)
    theirs = evaluate(place.model, place.start, place.client.test, task, "torch")
    ours = evaluate_on_device(
        Session(place.folder, adapter=place.start, threads=1), place.client.test
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_mixed_federation_on_the_watch(place: Place, optimizer: str, tmp_path: Path) -> None:
    """Every other client trains in ONNX Runtime, as if all did in torch."""
    if place.task != "classification":
        pytest.skip("one base is enough for whole rounds")
    experiment = ExperimentConfig.from_table(
        {
            "name": "watch",
            "base": {"id": "watch-cnn"},
            "data": {"id": "watch", "task": "classification"},
            "lora": {"rank": 4, "lora_alpha": 8},
            "federation": {
                "rounds": 3, "cohort": 6, "local_steps": 4, "batch_size": 8,
                "optimizer": optimizer, "learning_rate": 0.05 if optimizer == "sgd" else 3e-3,
            },
        }
    )  # fmt: skip
    found = {}
    for name, count in (("torch", 0), ("mixed", 2)):

        def app(message: Message, context: Context, count: int = count) -> Message:
            number = context.node_config["partition-id"]
            context.node_config["trainer"] = "onnx" if number % 2 < count - 1 else "torch"
            return client_app(message, context)

        node = {"bundle": str(place.folder)}
        grid = InProcessGrid(app, 10, node_config=node)  # type: ignore[arg-type]
        found[name] = run_federation(grid, experiment, tmp_path / name).adapter
        assert [record.dropped for record in read_rounds(tmp_path / name)] == [()] * 3
    segments = segments_of(found["torch"], ("A", "B"))
    rows = {name: pack(adapter, segments) for name, adapter in found.items()}
    assert np.abs(rows["mixed"] - rows["torch"]).max() > 0
    if optimizer == "sgd":
        assert np.abs(rows["mixed"] - rows["torch"]).max() <= 1e-5
    inputs = place.client.test.inputs[:64]
    logits = {name: Session(place.folder, adapter=a).run(inputs) for name, a in found.items()}
    assert np.abs(logits["mixed"] - logits["torch"]).max() <= 1e-4
    assert np.abs(logits["mixed"] - Session(place.folder).run(inputs)).max() > 0.05


def test_training_on_a_device_helps_its_owner(place: Place) -> None:
    """From the base on, the owner's held-out loss falls."""
    config = replace(ADAMW, local_steps=40, learning_rate=1e-3)
    batches = list(draw_batches(place.client.train, config, 0, "someone", 1))
    session = Session(place.folder, threads=1)
    before = evaluate_on_device(session, place.client.test)["loss"]
    trained = Trainer(session.bundle).fit(batches, config)
    session.swap(trained.adapter)
    after = evaluate_on_device(session, place.client.test)["loss"]
    assert after < before - 0.01
