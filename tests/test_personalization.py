"""Clients personalized together against each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.data import ClientData, Examples
from fedlora.errors import NonFiniteError
from fedlora.experiment import ExperimentConfig
from fedlora.nn import extract_adapter, get_task, inject_lora
from fedlora.personalization import Person, compare_adapters, compare_many
from fedlora.simulation.threads import one_torch_thread
from fedlora.world import open_world
from tests.nn.models import Mlp, seeded

CLASSES = get_task("classification")


def experiment(**overrides: Any) -> ExperimentConfig:
    table = {
        "name": "small",
        "base": {"id": "tiny-chat"},
        "data": {"id": "chitchat-small", "task": "next-token", "clients": 3, "max_length": 12},
        "lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
        "federation": {"cohort": 2, "local_steps": 1, "batch_size": 3, "learning_rate": 5e-3},
        "personalization": {"steps": 2},
    }
    return ExperimentConfig.from_table(table, overrides)


def shaken(adapter: Adapter, seed: int = 0) -> Adapter:
    random = np.random.default_rng(seed)

    def layer(old: LoraLayer) -> LoraLayer:
        B = 0.05 * random.normal(size=old.B.shape)
        return LoraLayer(old.A, B.astype(np.float32), old.scaling, old.magnitude, old.kind)

    layers = {path: layer(old) for path, old in adapter.layers.items()}
    return Adapter(layers, adapter.config, adapter.base)


def examples(rows: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(rows, 6)).astype(np.float32)
    return Examples(inputs, random.integers(0, 3, rows))


def client(name: str, rows: int, seed: int) -> ClientData:
    return ClientData(name, examples(rows, seed), examples(0, 0), examples(rows + 1, seed + 50))


def assert_same(found: Person | NonFiniteError, alone: Person) -> None:
    assert isinstance(found, Person), found
    assert found.client_id == alone.client_id
    for mine, theirs in ((found.own, alone.own), (found.personal, alone.personal)):
        assert mine.layers.keys() == theirs.layers.keys()
        assert (mine.base, mine.config) == (theirs.base, theirs.config)
        for path, layer in mine.layers.items():
            # AdamW divides by the root of a gradient's square: where that is next to nothing,
            # another order of summation moves a step by up to the learning rate.
            np.testing.assert_allclose(layer.A, theirs[path].A, atol=1e-4)
            np.testing.assert_allclose(layer.B, theirs[path].B, atol=1e-4)
    assert found.scores.keys() == alone.scores.keys() == {"base", "own", "global", "personal"}
    for name, scores in alone.scores.items():
        assert found.scores[name] == pytest.approx(scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("together", [True, False])
def test_messages_of_many_clients_give_what_each_gives_alone(together):
    config = experiment()
    world = open_world(config.base, config.data, config.lora, config.seed)
    shared = shaken(world.initial)
    people = []
    for steps, name in enumerate(world.data.client_ids):  # different numbers of steps
        data = world.data.client(name)
        test = data.test.take(range(3 + 20 * (steps == 1)))  # one of them fills a pass
        people.append((replace(data, test=test), steps))
    setting = {"initial": world.initial, "shared": shared}
    with one_torch_thread():
        found = compare_many(world.model, people, world.task, config, **setting, together=together)
        for person, (data, steps) in zip(found, people, strict=True):
            alone = compare_adapters(
                world.model, data, world.task, config, **setting, federated_steps=steps
            )
            assert_same(person, alone)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"variant": "dora"}], ids=str)
def test_classes_of_many_clients_give_what_each_gives_alone(options):
    """Dropout and DoRA cannot be batched, and are trained one client at a time."""
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear", **options), seed=0)
    initial = extract_adapter(model)
    setting = {"initial": initial, "shared": shaken(initial)}
    config = experiment()
    people = [(client(f"c{k}", rows, k), k % 3) for k, rows in enumerate((5, 1, 2, 9, 3))]
    found = compare_many(model, people, CLASSES, config, **setting)
    for person, (data, steps) in zip(found, people, strict=True):
        alone = compare_adapters(model, data, CLASSES, config, **setting, federated_steps=steps)
        assert_same(person, alone)


def test_a_client_without_training_examples_keeps_what_it_was_given():
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    initial = extract_adapter(model)
    shared = shaken(initial)
    idle = ClientData("idle", examples(0, 0), examples(0, 0), examples(2, 1))
    busy = client("busy", 4, 2)
    found = compare_many(
        model, [(busy, 1), (idle, 0)], CLASSES, experiment(), initial=initial, shared=shared
    )
    person = found[1]
    assert isinstance(person, Person)
    assert person.own == initial
    assert person.personal == shared
    assert person.scores["own"] == pytest.approx(person.scores["base"], rel=1e-6)


def test_a_diverging_client_has_the_error_that_it_has_alone_and_changes_no_other():
    model = seeded(Mlp)
    with torch.no_grad():
        model.first.weight.mul_(20)  # so that a huge feature overflows
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    initial = extract_adapter(model)
    setting = {"initial": initial, "shared": shaken(initial)}
    config = experiment()
    huge = Examples(np.full((4, 6), 3e38, np.float32), np.array([0, 1, 2, 0]))
    bad = replace(client("bad", 4, 1), train=huge)
    good = client("good", 4, 2)
    with pytest.raises(NonFiniteError) as alone:
        compare_adapters(model, bad, CLASSES, config, **setting, federated_steps=1)
    found = compare_many(model, [(good, 1), (bad, 1), (good, 1)], CLASSES, config, **setting)
    assert isinstance(found[1], NonFiniteError)
    assert str(found[1]) == str(alone.value)
    expected = compare_adapters(model, good, CLASSES, config, **setting, federated_steps=1)
    assert_same(found[0], expected)
    assert_same(found[2], expected)
