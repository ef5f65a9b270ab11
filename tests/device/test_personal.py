"""Personalizing: what is better is kept, what is not changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.data import Examples
from fedlora.device.owner_data import OwnerData
from fedlora.device.personal import evaluate_all, personalize
from fedlora.device.scoring import evaluate
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.errors import NonFiniteError, StoreError
from fedlora.store import Store
from fedlora.targets import initial_adapter
from fedlora.training import TrainConfig
from tests.device.hand_made import CLASSES, FEATURES, HandMade, write_classifier
from tests.matching import raises

CONFIG = TrainConfig(local_steps=60, learning_rate=2e-2, batch_size=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def store(made: HandMade, tmp_path: Path) -> Store:
    return Store.create(tmp_path / "state", made.folder)


@pytest.fixture(scope="module")
def session(made: HandMade) -> Session:
    return Session(made.folder, threads=1)


@pytest.fixture(scope="module")
def trainer(made: HandMade) -> Trainer:
    return Trainer(made.folder, threads=1)


def owner(seed: int, shuffled: bool = False) -> OwnerData:
    """Rows whose class is where a random direction says; or whose classes say nothing."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(160, FEATURES)).astype(np.float32)
    targets = (inputs @ generator.normal(size=(FEATURES, CLASSES))).argmax(1)
    if shuffled:
        targets = generator.permutation(targets)
    examples = Examples(inputs, targets)
    return OwnerData(examples.take(np.arange(120)), examples.take(np.arange(120, 160)))


def test_a_better_adapter_is_kept_and_served(
    store: Store, session: Session, trainer: Trainer, made: HandMade
) -> None:
    data, seen = owner(1), []
    done = personalize(
        store, session, trainer, data, CONFIG, progress=lambda step, loss: seen.append(step)
    )
    assert done.kept
    assert done.replaced == "base"
    assert done.after["loss"] < done.before["loss"]
    assert done.after["accuracy"] > done.before["accuracy"]
    assert (done.steps, done.train_examples, done.held_out_examples) == (60, 120, 40)
    assert seen == list(range(1, 61))
    found = Store.open(store.path)
    assert session.adapter == found.serving() == found.personal_adapter()
    assert evaluate(session, data.held_out) == done.after
    personal = found.status().personal
    assert personal is not None
    assert personal.started_from is None
    assert personal.metrics["after"] == done.after
    assert evaluate(Session(made.folder, threads=1), data.held_out) == done.before


def test_it_starts_from_the_installed_adapter_unless_told_otherwise(
    store: Store, session: Session, trainer: Trainer, made: HandMade
) -> None:
    base = initial_adapter(made.manifest.layers, made.manifest.lora, 0, made.manifest.base)
    shared = trainer.fit([], CONFIG, init=made.adapter(rank=3)).adapter
    store.install_global(shared)
    one = TrainConfig(local_steps=1, learning_rate=1e-3)
    for from_base, start in ((False, shared), (True, base)):
        store.forget()
        data = owner(1)
        personalize(store, session, trainer, data, one, from_base=from_base)
        personal = store.personal_adapter()
        if personal is None:  # it was not better
            continue
        assert personal.ranks == start.ranks
        # One step of AdamW moves a number by the learning rate at most.
        for path, layer in personal.layers.items():
            assert np.abs(layer.A - start[path].A).max() <= 1.001e-3
        status = store.status()
        assert status.personal is not None
        expected = None if from_base else shared.fingerprint()
        assert status.personal.started_from == expected
        assert not status.personal.stale


def test_what_is_not_better_is_dropped_and_the_old_one_stays(
    store: Store, session: Session, trainer: Trainer
) -> None:
    good = owner(1)
    assert personalize(store, session, trainer, good, CONFIG).kept
    before = (store.path / "state.json").read_bytes()
    served = store.serving()
    # What is trained on says nothing of what is held out.
    misleading = OwnerData(owner(1, shuffled=True).train, good.held_out)
    done = personalize(store, session, trainer, misleading, CONFIG)
    assert not done.kept
    assert done.replaced == "personal"
    assert done.after["loss"] >= done.before["loss"]
    assert (store.path / "state.json").read_bytes() == before
    assert session.adapter == store.serving() == served


def test_a_training_that_fails_changes_nothing(
    store: Store, session: Session, trainer: Trainer
) -> None:
    before = (store.path / "state.json").read_bytes()
    wild = TrainConfig(local_steps=50, learning_rate=1e30)
    with pytest.raises(NonFiniteError):
        personalize(store, session, trainer, owner(1), wild)
    assert (store.path / "state.json").read_bytes() == before
    assert store.serving() is None


def test_the_state_is_locked_while_it_trains(
    store: Store, session: Session, trainer: Trainer, made: HandMade
) -> None:
    other = Store.open(store.path)

    def install(step: int, loss: float) -> None:
        if step == 1:
            with raises(StoreError, "another process is writing"):
                other.install_global(made.adapter())

    assert personalize(store, session, trainer, owner(1), CONFIG, progress=install).kept
    other.install_global(made.adapter())


def test_every_adapter_is_evaluated_on_the_same(
    store: Store, session: Session, trainer: Trainer, made: HandMade
) -> None:
    data = owner(1)
    assert list(evaluate_all(store, session, data)) == ["base"]
    store.install_global(made.adapter())
    done = personalize(store, session, trainer, data, CONFIG)
    assert done.kept
    found = evaluate_all(store, session, data)
    assert list(found) == ["base", "global", "personal"]
    assert found["global"] == done.before
    assert found["personal"] == done.after
    assert session.adapter == store.personal_adapter()
