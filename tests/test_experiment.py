"""The experiment file: what is refused and how, and that what is written is read back equal."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, FedloraError, UnknownNameError
from fedlora.experiment import (
    ExperimentConfig,
    app_root,
    find_experiment,
    parse_override,
)
from fedlora.plain import from_plain, to_plain
from fedlora.training import LocalRule, TrainConfig
from tests.federation.fakes import raises

TABLE: dict[str, Any] = {
    "name": "test",
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification"},
    "federation": {"local_steps": 4},
}


def build(**overrides: Any) -> ExperimentConfig:
    return ExperimentConfig.from_table(
        TABLE, {key.replace("__", "."): value for key, value in overrides.items()}
    )


def test_what_is_not_said_has_its_default() -> None:
    config = build()
    assert (config.seed, config.lora.rank, config.federation.method) == (0, 8, "fedit")
    assert config.federation.train == TrainConfig(local_steps=4)
    assert config.data.clients is None


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "the better adapter without examples to tell": (
        {"personalization.keep_better": True},
        "personalization.keep_better: expected data.validation_share over 0, by whose examples",
    ),
    "a mixture of more than all": (
        {"personalization.mixing_weight": 1.5},
        "personalization.mixing_weight: expected a share in [0, 1], found 1.5",
    ),
    "a kind that is not known": (
        {"personalization.kind": "mixd"},
        "personalization.kind: expected one of personal, mixed, found 'mixd'",
    ),
    "a pull away": (
        {"personalization.proximal_weight": -1.0},
        "personalization.proximal_weight: expected a finite number >= 0, found -1.0",
    ),
    "a key misspelt": (
        {"federation.lerning_rate": 0.1},
        "federation.lerning_rate: unknown key; did you mean 'learning_rate'?",
    ),
    "a table misspelt": (
        {"federatoin.rounds": 3}, "federatoin: unknown key; did you mean 'federation'?",
    ),
    "a key in the wrong table": (
        {"data.rounds": 3},
        "data.rounds: unknown key; known: clients, held_out_clients, id, max_length, partition, "
        "task, "
        "test_share, validation_share",
    ),
    "the name of a class in the code": (
        {"federation.train.local_steps": 3},
        "federation.train: unknown key",
    ),
    "a text for a number": ({"lora.rank": "8"}, "lora.rank: expected a whole number, found '8'"),
    "a fraction for a whole number": (
        {"lora.rank": 8.5}, "lora.rank: expected a whole number, found 8.5",
    ),
    "true for a number": ({"seed": True}, "seed: expected a whole number, found True"),
    "a number for a table": ({"lora": 8}, "lora: expected a table, found 8"),
    "a number for a text": ({"base.id": 8}, "base.id: expected a text, found 8"),
    "a number for a list": (
        {"lora.layers_to_transform": 3},
        "lora.layers_to_transform: expected a list, found 3",
    ),
    "a word that is none of the choices": (
        {"federation.sampling": "bernoulli"},
        "federation.sampling: expected one of fixed, poisson, found 'bernoulli'",
    ),
    "another engine": (
        {"engine.kind": "ray"},
        "engine.kind: expected one of cohort, sequential, flower, found 'ray'",
    ),
    "other bits": (
        {"base.quantize": "int4"}, "base.quantize: expected one of nf4, int8, found 'int4'",
    ),
    "other bits of a secure sum": (
        {"secure_aggregation.bits": 16},
        "secure_aggregation.bits: expected one of 32, 64, found 16",
    ),
    "a number that no float can hold": (
        {"federation.learning_rate": 10**400},
        "federation.learning_rate: expected a number, found one that is too large",
    ),
    "a word for true": (
        {"engine.checkpointing": "yes"},
        "engine.checkpointing: expected true or false, found 'yes'",
    ),
    "no name": ({"name": " "}, "name: expected a word for this experiment, found an empty text"),
    "no client": ({"data.clients": 0}, "data.clients: expected a whole number >= 1, found 0"),
    "everyone held out": (
        {"data.held_out_clients": 1.0},
        "data.held_out_clients: expected a share in [0, 1), found 1.0",
    ),
    "nothing to test on": (
        {"data.test_share": 0.0},
        "data.test_share must be over 0, and test_share + validation_share under 1; found 0.0 "
        "and 0.0",
    ),
    "nothing to train on": (
        {"data.test_share": 0.5, "data.validation_share": 0.5},
        "data.test_share must be over 0, and test_share + validation_share under 1; found 0.5 "
        "and 0.5",
    ),
    "steps and epochs": (
        {"federation.local_epochs": 2},
        "federation: expected exactly one of local_steps and local_epochs, found local_steps=4 and "
        "local_epochs=2",
    ),
    "neither steps nor epochs": (
        {"federation.local_steps": None},
        "federation: expected exactly one of local_steps and local_epochs, found "
        "local_steps=None and "
        "local_epochs=None",
    ),
    "a path for a name": (
        {"name": "../run"}, "name: expected a word and not a path, found '../run'",
    ),
    "a personal learning rate of nothing": (
        {"personalization.learning_rate": 0},
        "personalization.learning_rate: expected a finite number > 0, found 0.0",
    ),
    "a personal batch of nothing": (
        {"personalization.batch_size": 0},
        "personalization.batch_size: expected a whole number >= 1, found 0",
    ),
    "a learning rate of nothing": (
        {"federation.learning_rate": 0},
        "federation: learning_rate: expected a finite number > 0, found 0.0",
    ),
    "momentum without sgd": (
        {"federation.momentum": 0.9},
        "federation: momentum is sgd's: set optimizer = 'sgd', or remove momentum",
    ),
    "a cohort of nobody": (
        {"federation.cohort": 0}, "federation.cohort: expected a whole number >= 1, found 0",
    ),
    "DoRA": (
        {"lora.variant": "dora"},
        "lora.variant: expected 'lora' or 'rslora' in a federation, found 'dora'; fedit "
        "averages A and "
        "B alone",
    ),
    "a key under a value": ({"name.x": 1}, "name.x: 'name' is a value, not a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_makes_no_sense_is_refused_by_its_key(name: str) -> None:
    overrides, text = REFUSALS[name]
    with pytest.raises(ConfigError) as error:
        ExperimentConfig.from_table(TABLE, overrides)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["name", "base", "data", "federation"])
def test_a_missing_key_is_named(key: str) -> None:
    table = {name: value for name, value in TABLE.items() if name != key}
    with raises(ConfigError, f"{key}: this key is needed and is missing"):
        ExperimentConfig.from_table(table)


def test_a_missing_key_in_a_table_is_named_with_its_table() -> None:
    with raises(ConfigError, "data.task: this key is needed and is missing"):
        ExperimentConfig.from_table(TABLE | {"data": {"id": "watch"}})


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with raises(UnknownNameError, "unknown method 'fedlt'; did you mean 'fedit'?"):
        build(federation__method="fedlt")


def test_a_rule_stands_before_the_mean_and_a_server_optimizer_behind_it() -> None:
    config = build(
        federation__robust="norm-bound",
        federation__robust_options={"bound": 2.5, "max_share": 0.5},
        federation__server_optimizer="adam",
        federation__server_options={"learning_rate": 0.02},
    )
    built = config.federation.build_method()
    assert (built.name, built.linear, built.exact) == ("fedit+norm-bound+adam", False, False)
    assert build().federation.build_method().name == "fedit"
    assert ExperimentConfig.from_table(config.to_table()) == config


RULES_AND_OPTIMIZERS: dict[str, tuple[dict[str, Any], type[FedloraError], str]] = {
    "unknown rule": (
        {"robust": "multikrum"},
        UnknownNameError,
        "unknown robust rule 'multikrum'; did you mean 'multi-krum'?",
    ),
    "unknown optimizer": (
        {"server_optimizer": "adagard"},
        UnknownNameError,
        "unknown server optimizer 'adagard'; did you mean 'adagrad'?",
    ),
    "unknown option": (
        {"robust": "multi-krum", "robust_options": {"atackers": 2}},
        ConfigError,
        "federation.robust: robust rule 'multi-krum': unknown option 'atackers'; did you mean "
        "'attackers'?",
    ),
    "options of nothing": (
        {"server_options": {"beta1": 0.5}},
        ConfigError,
        "federation.server_options: expected federation.server_optimizer beside it, found none; "
        "name one, or remove the options",
    ),
    "a cohort that is too small": (
        {"robust": "multi-krum", "robust_options": {"attackers": 4}, "cohort": 10},
        ConfigError,
        "federation.cohort: expected at least 11 for multi-krum with {'attackers': 4}, found 10",
    ),
}


@pytest.mark.parametrize("case", RULES_AND_OPTIMIZERS)
def test_a_rule_or_optimizer_that_cannot_be_is_refused(case: str) -> None:
    keys, error, text = RULES_AND_OPTIMIZERS[case]
    with raises(error, text):
        build(**{f"federation__{key}": value for key, value in keys.items()})


def test_overrides_change_their_key_and_leave_the_given_table_alone() -> None:
    table = TABLE | {"lora": {"rank_pattern": {"fc": 2}}}
    config = ExperimentConfig.from_table(
        table, {"lora.rank_pattern.conv": 3, "federation.rounds": 7, "seed": 5}
    )
    assert config.lora.rank_pattern == {"fc": 2, "conv": 3}
    assert (config.federation.rounds, config.seed) == (7, 5)
    assert table["lora"] == {"rank_pattern": {"fc": 2}}
    assert TABLE["federation"] == {"local_steps": 4}


def test_an_override_with_none_takes_a_value_away() -> None:
    config = build(federation__local_steps=None, federation__local_epochs=2)
    assert config.federation.train == TrainConfig(local_epochs=2)


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "a rule and a server optimizer": {
        "federation__robust": "norm-bound",
        "federation__robust_options": {"bound": 2.5},
        "federation__server_optimizer": "yogi",
        "federation__server_options": {"tau": 0.01},
    },
    "everything of LoRA": {
        "lora__target_modules": r".*\.(q|v)_proj",
        "lora__rank_pattern": {r"layers\.0\..*": 4},
        "lora__alpha_pattern": {"q_proj": 3.5},
        "lora__layers_to_transform": [0, 2],
        "lora__layers_pattern": ["layers"],
        "lora__variant": "rslora",
        "lora__lora_dropout": 0.1,
    },
    "names of modules": {"lora__target_modules": ["q_proj", "v_proj"], "lora__layers": "last:2"},
    "everything of the federation": {
        "federation__method": "ffa-lora",
        "federation__sampling": "poisson",
        "federation__weights": "equal",
        "federation__optimizer": "sgd",
        "federation__momentum": 0.9,
        "federation__max_grad_norm": 1,
        "federation__weight_decay": 0.01,
        "data__clients": 30,
        "data__held_out_clients": 0.25,
        "data__validation_share": 0.1,
        "personalization__learning_rate": 0.01,
        "personalization__steps": 0,
        "engine__kind": "flower",
        "seed": 2**40,
    },
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_resolved_file_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config = build(**ROUND_TRIPS[name])
    path = tmp_path / "experiment.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert ExperimentConfig.from_toml(path) == config
    assert tomllib.loads(config.to_toml()) == config.to_table()


def test_errors_of_a_file_open_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with raises(ConfigError, f"{path}: cannot be read: No such file or directory"):
        ExperimentConfig.from_toml(path)
    path.write_text("name = ")
    with pytest.raises(ConfigError) as error:
        ExperimentConfig.from_toml(path)
    assert str(error.value).startswith(f"{path}: not valid TOML: Invalid value")
    path.write_text("nam = 'x'")
    with raises(ConfigError, f"{path}: nam: unknown key; did you mean 'name'?"):
        ExperimentConfig.from_toml(path)


@pytest.mark.parametrize("name", ["authors", "keyboard", "watch"])
def test_the_bundled_experiments_are_valid_and_found_by_name(name: str) -> None:
    path = find_experiment(name)
    assert path == app_root() / "simulations" / f"{name}.toml"
    assert ExperimentConfig.from_toml(path).name == name


def test_an_experiment_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown experiment 'wach'; did you mean 'watch'"):
        find_experiment("wach")
    with raises(ConfigError, f"{tmp_path}/x.toml: no such experiment file"):
        find_experiment(f"{tmp_path}/x.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("federation.rounds=5", ("federation.rounds", 5)),
        ("a.b = 1e-3 ", ("a.b", 0.001)),
        ("lora.target_modules=['q', 'v']", ("lora.target_modules", ["q", "v"])),
        ("lora.target_modules=all-linear", ("lora.target_modules", "all-linear")),
        ("name='my run'", ("name", "my run")),
        ("data.id=mine:chats", ("data.id", "mine:chats")),
        ("x=a=b", ("x", "a=b")),
        ("flag=true", ("flag", True)),
    ],
)
def test_an_override_is_read_as_toml_or_as_text(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["rounds", "=5", " = 5"])
def test_an_override_without_a_key_is_refused(text: str) -> None:
    with raises(ConfigError, f"--set {text}: expected key=value, such as federation.rounds=5"):
        parse_override(text)


def test_sets_are_written_sorted_and_read_back() -> None:
    rule = LocalRule(frozenset({"B", "A"}))
    assert to_plain(rule)["trained"] == ["A", "B"]
    assert from_plain(LocalRule, to_plain(rule)) == rule
    with raises(ConfigError, "rule.trained: expected one of A, B, magnitude, found 'C'"):
        from_plain(LocalRule, {"trained": ["C"]}, "rule")


def test_a_cosine_schedule_falls_from_the_learning_rate_to_nearly_nothing() -> None:
    config = build(
        federation__schedule="cosine", federation__rounds=4, federation__learning_rate=0.8
    )
    rates = [config.federation.train_in(round).learning_rate for round in (1, 2, 3, 4)]
    half = 0.4 * 2**-0.5
    assert rates == pytest.approx([0.8, 0.4 + half, 0.4, 0.4 - half])
    # A run that goes on for longer than it was asked to still trains.
    assert config.federation.train_in(9).learning_rate > 0


def test_a_constant_schedule_changes_nothing() -> None:
    config = build()
    assert config.federation.train_in(7) is config.federation.train
