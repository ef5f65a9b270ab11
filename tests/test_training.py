"""Training values: checks and counts."""

from __future__ import annotations

import pytest

from fedlora.errors import ConfigError
from fedlora.training import LocalRule, TrainConfig
from tests.matching import raises

REFUSED = {
    "neither": ({}, "expected exactly one of local_steps and local_epochs, found local_steps=None"),
    "both": ({"local_steps": 1, "local_epochs": 1}, "found local_steps=1 and local_epochs=1"),
    "negative": ({"local_steps": -1}, "local_steps: expected a whole number >= 0, found -1"),
    "fraction": ({"local_epochs": 0.5}, "local_epochs: expected a whole number >= 0, found 0.5"),
    "true": ({"local_steps": True}, "local_steps: expected a whole number >= 0, found True"),
    "batch": ({"local_steps": 1, "batch_size": 0}, "batch_size: expected a whole number >= 1"),
    "rate": ({"local_steps": 1, "learning_rate": 0}, "learning_rate: expected a finite number > 0"),
    "NaN": ({"local_steps": 1, "learning_rate": float("nan")}, "learning_rate: expected a finite"),
    "optimizer": ({"local_steps": 1, "optimizer": "lion"}, "expected 'adamw' or 'sgd', found 'l"),
    "decay": ({"local_steps": 1, "weight_decay": -1}, "weight_decay: expected a number >= 0"),
    "momentum": ({"local_steps": 1, "optimizer": "sgd", "momentum": 1}, "a number in [0, 1)"),
    "adam": ({"local_steps": 1, "momentum": 0.9}, "momentum is sgd's: set optimizer = 'sgd'"),
    "clip": ({"local_steps": 1, "max_grad_norm": 0}, "max_grad_norm: expected a finite number > 0"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED)
def test_training_that_makes_no_sense_is_refused(arguments, text):
    with raises(ConfigError, text):
        TrainConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "examples", "steps"),
    [
        ({"local_steps": 5}, 3, 5),
        ({"local_steps": 5}, 0, 0),
        ({"local_epochs": 2, "batch_size": 4}, 9, 6),
        ({"local_epochs": 2, "batch_size": 4}, 8, 4),
        ({"local_epochs": 0}, 8, 0),
    ],
)
def test_steps_are_counted(arguments, examples, steps):
    assert TrainConfig(**arguments).steps_for(examples) == steps


@pytest.mark.parametrize("trained", [frozenset(), frozenset({"C"}), frozenset({"A", "bias"})])
def test_rule_that_trains_nothing_or_a_stranger_is_refused(trained):
    with raises(ConfigError, "trained: expected some of A, B, magnitude, found"):
        LocalRule(trained=trained)
