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


def pulled(adapter: Adapter, other: Adapter) -> float:
    """Squared distance of the factors of two adapters."""
    return sum(
        float(np.square(layer.A - other[path].A).sum() + np.square(layer.B - other[path].B).sum())
        for path, layer in adapter.layers.items()
    )


def mlp_setting() -> tuple[Mlp, dict[str, Adapter]]:
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    initial = extract_adapter(model)
    return model, {"initial": initial, "shared": shaken(initial)}


def test_dittos_pull_keeps_the_personal_adapter_near_the_global_and_the_own_as_it_was():
    model, setting = mlp_setting()
    people = [(client("c", 6, 1), 1), (client("d", 9, 2), 2)]
    found = {}
    for weight in (0.0, 100.0):
        config = experiment(
            **{"personalization.proximal_weight": weight, "personalization.steps": 20,
               "federation.optimizer": "sgd"}
        )  # fmt: skip
        found[weight] = compare_many(model, people, CLASSES, config, **setting)
        for person, (data, steps) in zip(found[weight], people, strict=True):
            alone = compare_adapters(model, data, CLASSES, config, **setting, federated_steps=steps)
            assert_same(person, alone)
    for free, held in zip(found[0.0], found[100.0], strict=True):
        assert free.own == held.own
        near, far = (pulled(p.personal, setting["shared"]) for p in (held, free))
        # Twenty steps of 5e-3 * 100 = 1/2 of the way back: a free step's distance is left.
        assert 0 < near < 0.1 * far


def test_one_step_of_ditto_is_the_gradient_and_the_pull():
    """v2 = v1 - rate * (gradient(v1) + lambda * (v1 - w)), by two runs of one step each."""
    model, setting = mlp_setting()
    data = client("c", 8, 1)  # batches of all rows: the same gradient in every step
    options = {"federation.optimizer": "sgd", "federation.batch_size": 8}
    rate, weight = 5e-3, 7.0

    def personal(steps: int, weight: float) -> Adapter:
        config = experiment(
            **options, **{"personalization.steps": steps, "personalization.proximal_weight": weight}
        )
        person = compare_adapters(model, data, CLASSES, config, **setting, federated_steps=1)
        return person.personal

    start, first = setting["shared"], personal(1, weight)
    second, free = personal(2, weight), personal(2, 0.0)
    for path in start:
        # The first step starts at w, where there is no pull, so both runs take it alike.
        pull = rate * weight * (first[path].B - start[path].B)
        np.testing.assert_allclose(free[path].B - second[path].B, pull, rtol=1e-2, atol=1e-8)


def with_validation(data: ClientData, validation: Examples) -> ClientData:
    return replace(data, validation=validation)


def flipped(data: ClientData) -> ClientData:
    """A client whose validation part says the contrary of what it trains on."""
    other = Examples(data.train.inputs, (data.train.targets + 1) % 3)
    return with_validation(data, other)


@pytest.mark.parametrize("kind", ["personal", "mixed"])
@pytest.mark.parametrize("together", [True, False])
def test_who_does_worse_in_validation_keeps_the_global_adapter(kind, together):
    model, setting = mlp_setting()
    config = experiment(
        **{"personalization.keep_better": True, "data.validation_share": 0.1,
           "personalization.kind": kind, "personalization.steps": 30}
    )  # fmt: skip
    people = [
        (flipped(client("worse", 6, 1)), 1),
        (with_validation(client("better", 6, 2), client("better", 6, 2).train), 1),
        (client("untold", 6, 3), 1),  # without a validation part
    ]
    found = compare_many(model, people, CLASSES, config, **setting, together=together)
    assert [person.kept_global for person in found] == [True, False, False]
    for person, (data, steps) in zip(found, people, strict=True):
        alone = compare_adapters(model, data, CLASSES, config, **setting, federated_steps=steps)
        assert alone.kept_global == person.kept_global
        assert_same(person, alone)
    assert found[0].personal == setting["shared"]
    for name, value in found[0].scores["global"].items():
        assert found[0].scores["personal"][name] == pytest.approx(value, rel=1e-5)
    assert found[1].personal != setting["shared"]


def test_without_the_setting_nobody_keeps_the_global_adapter():
    model, setting = mlp_setting()
    data = flipped(client("worse", 6, 1))
    config = experiment(**{"personalization.steps": 30})
    [person] = compare_many(model, [(data, 1)], CLASSES, config, **setting)
    assert not person.kept_global
    assert person.personal != setting["shared"]


def test_mixed_changes_the_scores_of_the_personal_adapter_only():
    model, setting = mlp_setting()
    people = [(client("c", 6, 1), 1), (client("d", 9, 2), 2)]
    plain = compare_many(model, people, CLASSES, experiment(), **setting)
    config = experiment(**{"personalization.kind": "mixed"})
    mixed = compare_many(model, people, CLASSES, config, **setting)
    for one, other in zip(plain, mixed, strict=True):
        assert one.personal == other.personal
        for name in ("base", "own", "global"):
            assert one.scores[name] == pytest.approx(other.scores[name], rel=1e-6)
        weight = other.scores["personal"]["personal_weight"]
        assert 0 < weight <= config.personalization.mixing_weight
        assert one.scores["personal"]["loss"] != other.scores["personal"]["loss"]
