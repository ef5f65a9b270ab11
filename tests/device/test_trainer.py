"""Training in ONNX Runtime against training in torch, on the same batches."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.adapter import Adapter
from fedlora.device.runtime import open_bundle
from fedlora.device.trainer import Trainer
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    DataError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.flat import pack, segments_of
from fedlora.nn import beside, train_local
from fedlora.targets import initial_adapter
from fedlora.training import LocalRule, TrainConfig
from tests.device.hand_made import (
    HandMade,
    rewrite_manifest,
    write_classifier,
    write_language_model,
)
from tests.device.twins import examples, twin
from tests.matching import raises

STEPS = 20
ADAMW = TrainConfig(local_steps=STEPS, learning_rate=1e-2, weight_decay=0.01)
SGD = TrainConfig(local_steps=STEPS, learning_rate=0.1, optimizer="sgd")
FC2 = ("fc2",)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"), rows=(16,))


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    folder = tmp_path_factory.mktemp("language")
    return write_language_model(folder, buckets=((4, 16), (2, 8)), decode=False)


def adapters(made: HandMade, ranks: list[int], seed: int = 1) -> Adapter:
    """A random adapter with another rank in each layer."""
    found = made.adapter(seed=seed)
    layers = {
        path: made.adapter(rank=rank, seed=seed)[path]
        for path, rank in zip(found, ranks, strict=False)
    }
    return replace(found, layers=layers)


def both(
    made: HandMade, init: Adapter, batches: list[Any], config: TrainConfig, **options: Any
) -> tuple[Any, Any]:
    """What the device and torch give."""
    trainer = Trainer(made.folder, threads=1)
    frozen = options.pop("frozen", None)
    if config.optimizer == "sgd" and made.manifest.task == "next-token":
        # Its losses are about 10 and fall steeply: a larger step would jump to and fro.
        config = replace(config, learning_rate=config.learning_rate / 50)
    ours = trainer.fit(batches, config, init=init, frozen=frozen, **options)
    model = twin(made, init)
    with beside(model, frozen):
        theirs = train_local(model, batches, config, task=made.manifest.task, **options)
    return ours, theirs


def distance(one: Adapter, other: Adapter) -> float:
    """The largest difference of any factor."""
    segments = segments_of(one, ("A", "B"))
    return float(np.abs(pack(one, segments) - pack(other, segments)).max())


RULES: dict[str, tuple[TrainConfig, LocalRule]] = {
    "adamw": (ADAMW, LocalRule()),
    "sgd": (SGD, LocalRule()),
    "momentum": (replace(SGD, momentum=0.9, weight_decay=0.01, learning_rate=0.01), LocalRule()),
    "clipped": (replace(SGD, max_grad_norm=0.1), LocalRule()),
    "only B": (ADAMW, LocalRule(trained=frozenset({"B"}))),
    "only A": (SGD, LocalRule(trained=frozenset({"A"}))),
    "proximal": (replace(SGD, max_grad_norm=1.0), LocalRule(proximal_weight=0.5)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_twenty_steps_are_those_of_torch(
    kind: str, rule: str, request: pytest.FixtureRequest
) -> None:
    made: HandMade = request.getfixturevalue(kind)
    config, local = RULES[rule]
    init = adapters(made, [1, 4, 3])
    batches = examples(made, STEPS, 16 if kind == "classifier" else 4)
    ours, theirs = both(made, init, batches, config, rule=local)
    assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
    assert (ours.steps, ours.num_examples) == (theirs.steps, theirs.num_examples)
    # AdamW divides by the root of what may be almost zero, which blows roundings up.
    assert distance(ours.adapter, theirs.adapter) < (1e-4 if config.optimizer == "adamw" else 5e-6)
    assert distance(ours.adapter, init) > 2e-3
    for path, layer in init.layers.items():
        for factor in {"A", "B"} - local.trained:
            np.testing.assert_array_equal(
                getattr(ours.adapter[path], factor), getattr(layer, factor)
            )
        assert ours.adapter[path].scaling == layer.scaling


@pytest.mark.parametrize("rows", [1, 3, 7, 16, 37])
@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_batches_of_any_size_are_trained_whole(
    kind: str, rows: int, request: pytest.FixtureRequest
) -> None:
    """Filled up, or in pieces that are weighted by what they count."""
    made: HandMade = request.getfixturevalue(kind)
    init = made.adapter(rank=2)
    ours, theirs = both(made, init, examples(made, 4, rows), SGD)
    assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
    assert distance(ours.adapter, theirs.adapter) < 5e-6


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_training_beside_a_frozen_adapter(classifier: HandMade, config: TrainConfig) -> None:
    init, frozen = classifier.adapter(rank=2, seed=1), classifier.adapter(rank=5, seed=2)
    batches = examples(classifier, STEPS, 16)
    ours, theirs = both(classifier, init, batches, config, frozen=frozen)
    assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
    assert distance(ours.adapter, theirs.adapter) < 1e-4
    alone = Trainer(classifier.folder, threads=1).fit(batches, config, init=init)
    assert abs(alone.loss - ours.loss) > 0.01


def test_corrections_are_added_after_clipping(classifier: HandMade) -> None:
    init = classifier.adapter(rank=2)
    random = np.random.default_rng(3)
    size = sum(segment.size for segment in segments_of(init, ("A", "B")))
    row = random.normal(0, 0.1, size).astype(np.float32)
    rule = LocalRule(correction="scaffold")
    config = replace(SGD, max_grad_norm=0.05)
    batches = examples(classifier, STEPS, 16)
    ours, theirs = both(classifier, init, batches, config, rule=rule, correction=row)
    assert distance(ours.adapter, theirs.adapter) < 5e-6
    plain = Trainer(classifier.folder, threads=1).fit(batches, config, init=init)
    assert distance(ours.adapter, plain.adapter) > 0.01


def test_an_adapter_on_some_of_the_layers(classifier: HandMade) -> None:
    config = fl.LoraConfig(rank=2, lora_alpha=4, target_modules=FC2)
    init = replace(classifier.adapter(rank=2, layers=FC2), config=config)
    ours, theirs = both(classifier, init, examples(classifier, STEPS, 16), ADAMW)
    assert list(ours.adapter) == ["fc2"]
    assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
    assert distance(ours.adapter, theirs.adapter) < 1e-4


def test_without_an_adapter_it_starts_as_everyone_does(classifier: HandMade) -> None:
    about = classifier.manifest
    init = initial_adapter(about.layers, about.lora, 7, about.base)
    batches = examples(classifier, 3, 16)
    trainer = Trainer(classifier.folder, threads=1)
    first = trainer.fit(batches, SGD, seed=7)
    assert first.adapter == trainer.fit(batches, SGD, init=init).adapter
    assert first.adapter != trainer.fit(batches, SGD, seed=8).adapter
    assert first.adapter.base == about.base


def test_without_a_config_it_takes_usual_steps(classifier: HandMade) -> None:
    batches = examples(classifier, 3, 16)
    found = Trainer(classifier.folder).fit(batches)
    usual = Trainer(classifier.folder).fit(batches, TrainConfig(local_steps=3))
    assert found.steps == 3
    assert found.adapter.fingerprint() == usual.adapter.fingerprint()


def test_the_same_training_gives_the_same_bytes(language: HandMade) -> None:
    init = language.adapter(rank=4)
    batches = examples(language, 6, 5)
    before = init.fingerprint()
    found = [
        Trainer(language.folder, threads=2).fit(batches, ADAMW, init=init).adapter.fingerprint()
        for _ in range(2)
    ]
    trainer = Trainer(language.folder, threads=2)
    found += [trainer.fit(batches, ADAMW, init=init).adapter.fingerprint() for _ in range(2)]
    assert len(set(found)) == 1
    assert init.fingerprint() == before != found[0]


def test_trainings_at_once_do_not_meet(language: HandMade) -> None:
    trainer = Trainer(language.folder, threads=1)
    batches = examples(language, 6, 5)
    inits = [language.adapter(rank=2, seed=seed) for seed in range(4)]
    alone = [trainer.fit(batches, ADAMW, init=init).adapter for init in inits]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda init: trainer.fit(batches, ADAMW, init=init).adapter, inits))
    assert found == alone


def test_no_batches_give_the_adapter_back(classifier: HandMade) -> None:
    init = classifier.adapter(rank=2)
    result = Trainer(classifier.folder, threads=1).fit([], SGD, init=init, num_examples=12)
    assert result.adapter == init
    assert (result.steps, result.num_examples) == (0, 12)
    assert np.isnan(result.loss)


def test_a_batch_in_which_nothing_is_counted_moves_nothing(language: HandMade) -> None:
    init = language.adapter(rank=2)
    (batch,) = examples(language, 1, 4)
    batch["targets"][:] = -100
    ours, theirs = both(language, init, [batch], SGD)
    assert ours.adapter == theirs.adapter == init
    assert ours.loss == theirs.loss == 0


def test_progress_hears_of_every_step(classifier: HandMade) -> None:
    heard: list[tuple[int, float]] = []
    result = Trainer(classifier.folder, threads=1).fit(
        examples(classifier, 3, 4), SGD, progress=lambda step, loss: heard.append((step, loss))
    )
    assert [step for step, _ in heard] == [1, 2, 3]
    assert np.mean([loss for _, loss in heard]) == pytest.approx(result.loss, abs=1e-12)


def test_a_factor_without_a_gradient_stays_where_it_is(classifier: HandMade) -> None:
    """B is zero, so that A's gradient is zero in the first step: 0 / (0 + eps)."""
    init = initial_adapter(classifier.manifest.layers, classifier.manifest.lora, 0)
    result = Trainer(classifier.folder, threads=1).fit(
        examples(classifier, 1, 16), TrainConfig(local_steps=1, learning_rate=1e-2), init=init
    )
    for path, layer in init.layers.items():
        np.testing.assert_array_equal(result.adapter[path].A, layer.A)
        assert np.abs(result.adapter[path].B).max() > 1e-3


def test_a_bundle_for_browsers_trains_as_well(classifier: HandMade, tmp_path: Path) -> None:
    """Its graphs have no defaults: zeros are fed for the layers that the adapter does not have."""
    web = write_classifier(tmp_path / "web", web=True)
    init = classifier.adapter(rank=2, layers=FC2)
    batches = examples(classifier, 3, 16)
    ours = Trainer(web.folder, threads=1).fit(batches, SGD, init=init)
    plain = Trainer(classifier.folder, threads=1).fit(batches, SGD, init=init)
    assert distance(ours.adapter, plain.adapter) < 1e-6


def test_a_loss_that_is_not_finite_names_the_step(classifier: HandMade) -> None:
    batches = examples(classifier, 3, 16)
    batches[1]["inputs"][0, 0] = np.inf
    with raises(
        NonFiniteError,
        "Trainer.fit, step 2: expected a finite loss, found nan; lower learning_rate, set "
        "max_grad_norm, or look for NaN in the client's data",
    ):
        Trainer(classifier.folder, threads=1).fit(batches, SGD)


def test_what_a_graph_cannot_run_is_an_error_in_one_line(language: HandMade) -> None:
    """A token that the base does not have; how many it has, only its graphs know."""
    (batch,) = examples(language, 1, 4)
    batch["inputs"][0, 0] = 10_000
    with pytest.raises(DataError, match=r"^a batch: ONNX Runtime cannot run train_4x16"):
        Trainer(language.folder, threads=1).fit([batch], SGD)


def test_a_trainer_and_others_share_an_open_bundle(classifier: HandMade) -> None:
    bundle = open_bundle(classifier.folder, threads=1, low_memory=True)
    batches = examples(classifier, 3, 16)
    ours = Trainer(bundle).fit(batches, SGD)
    assert Trainer(bundle).bundle is bundle
    assert distance(ours.adapter, Trainer(classifier.folder).fit(batches, SGD).adapter) < 1e-6


def test_adapters_that_do_not_fit_are_refused(classifier: HandMade) -> None:
    trainer = Trainer(classifier.folder, threads=1)
    mine = classifier.adapter(rank=2)
    layer = mine["fc2"]
    dora = replace(
        mine,
        layers={p: replace(v, magnitude=np.ones(v.out_features)) for p, v in mine.layers.items()},
        config=replace(mine.config, variant="dora"),
    )
    cases: list[tuple[Adapter, Any, str]] = [
        (replace(mine, base="f" * 64), BaseMismatchError, "found one of ffffffffffff"),
        (dora, UnsupportedError, "a DoRA adapter normalizes the base's weights"),
        (replace(mine, layers={"fc9": layer}), LayerMismatchError, "no factors for layer 'fc9'"),
        (
            replace(mine, layers={"fc1": layer}), ShapeMismatchError,
            "layer 'fc1': expected linear (6,) -> 8, found linear (8,) -> 3",
        ),
    ]  # fmt: skip
    for adapter, error, text in cases:
        with pytest.raises(error, match=rf"^the adapter to train: .*{re.escape(text)}"):
            trainer.fit([], SGD, init=adapter)
        with pytest.raises(error, match=rf"^the frozen adapter: .*{re.escape(text)}"):
            trainer.fit([], SGD, init=mine, frozen=adapter)


def test_rules_that_cannot_be_are_refused(classifier: HandMade) -> None:
    trainer = Trainer(classifier.folder, threads=1)
    row = np.zeros(3, np.float32)
    asked = LocalRule(correction="scaffold")
    for options, error, text in [
        ({"correction": row}, ConfigError, "expected none as its rule's correction, found one"),
        (
            {"rule": asked}, ConfigError,
            "expected one for 'scaffold' as its rule's correction, found none",
        ),
        (
            {"rule": asked, "correction": row}, ShapeMismatchError,
            "expected a correction of (50,), found (3,)",
        ),
        (
            {"rule": LocalRule(trained=frozenset({"magnitude"}))}, ConfigError,
            "the rule trains magnitude only, and there is none",
        ),
    ]:  # fmt: skip
        with raises(error, f"Trainer.fit: {text}"):
            trainer.fit([], SGD, init=classifier.adapter(rank=2), **options)


def test_a_bundle_with_an_adapter_merged_into_it_does_not_train(tmp_path: Path) -> None:
    made = write_classifier(tmp_path / "merged")
    rewrite_manifest(made.folder, replace(made.manifest, merged="d" * 64))
    with pytest.raises(BaseMismatchError, match=r"is merged into this bundle's weights"):
        Trainer(made.folder).fit([], SGD)
