"""A federation without torch: a trainer that computes its update from its id and the round."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast
from fedlora.experiment import ExperimentConfig
from fedlora.federation import (
    RoundRecord,
    handle_evaluate,
    handle_query,
    handle_train,
    run_federation,
)
from fedlora.federation.device_state import DeviceState, owners_state
from fedlora.federation.records import ClientSetup
from fedlora.federation.secure.handlers import (
    handle_agree,
    handle_keys,
    handle_masked,
    handle_shares,
    handle_unmask,
)
from fedlora.randomness import rng
from fedlora.simulation.grid import InProcessGrid
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.training import LocalRule, TrainConfig, TrainResult

SPECS = {
    "body.0.fc": LayerSpec("linear", (6,), 5),
    "body.1.fc": LayerSpec("linear", (5,), 4),
    "conv": LayerSpec("conv", (3, 2), 6),
}


@dataclass
class FakeTrainer:
    """Client number `number`: moves every trained factor a little, by (id, round) alone."""

    number: int
    num_examples: int = 10
    rank: int | None = None
    client_id: str = ""
    change: Callable[[TrainResult, Any], TrainResult] = field(default=lambda result, round: result)
    parts: tuple[str, ...] = ("validation", "test")  # of its data that hold examples
    overfitted: tuple[str, ...] = ()  # parts on which training makes it worse
    trained: dict[int | str, int] = field(default_factory=dict)  # steps, by round

    def __post_init__(self) -> None:
        self.client_id = self.client_id or f"c{self.number}"

    @property
    def initial(self) -> Adapter:
        return start_adapter(experiment())

    def evaluate(self, adapter: Adapter, part: str) -> dict[str, float] | None:
        """A loss that falls, and an accuracy that grows, with the size of B; by (id, part)."""
        if part not in self.parts:
            return None
        size = sum(float(np.abs(layer.B).sum()) for layer in adapter.layers.values())
        sign = -1 if part in self.overfitted else 1
        return {
            "loss": 2.0 + self.number - sign * min(1.0, size / 500),
            "accuracy": min(1.0, size / 1000),
            "secret": float(self.num_examples),  # a measure that is not declared
        }

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int | str,
        seed: int,
    ) -> TrainResult:
        generator = rng(seed, "fake", self.client_id, round)

        def moved(value: np.ndarray, trained: bool) -> np.ndarray:
            step = generator.normal(size=value.shape).astype(np.float32)
            return np.float32(0.9) * value + step if trained else value

        layers = {
            path: replace(
                layer, A=moved(layer.A, "A" in rule.trained), B=moved(layer.B, "B" in rule.trained)
            )
            for path, layer in broadcast.trainable.layers.items()
        }
        adapter = replace(broadcast.trainable, layers=layers)
        steps = config.steps_for(self.num_examples)
        loss = self.number + (1.0 / round if isinstance(round, int) else 0.0)
        self.trained[round] = steps
        return self.change(TrainResult(adapter, self.num_examples, loss, steps), round)


def fake_app(
    trainers: Mapping[int, FakeTrainer] | None = None, states: Path | None = None
) -> ClientApp:
    """A ClientApp whose client i is ``trainers[i]``, or a `FakeTrainer` with 10 + i examples.

    states: a folder in which each has a state folder of its own, named by its number.
    """
    app = ClientApp()

    def opener(context: Context) -> Callable[[ClientSetup], FakeTrainer]:
        number = int(context.node_config["partition-id"])
        chosen = (trainers or {}).get(number) or FakeTrainer(number, 10 + number)
        return lambda setup: chosen

    def device(context: Context) -> DeviceState | None:
        number = context.node_config["partition-id"]
        return None if states is None else owners_state({"state": str(states / str(number))})

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return handle_query(message, opener(context), device(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handle_train(message, opener(context), context.state, device(context))

    @app.train("keys")
    def keys(message: Message, context: Context) -> Message:
        return handle_keys(message, opener(context), context.state)

    @app.train("shares")
    def shares(message: Message, context: Context) -> Message:
        return handle_shares(message, context.state)

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        return handle_masked(message, opener(context), context.state, device(context))

    @app.train("agree")
    def agree(message: Message, context: Context) -> Message:
        return handle_agree(message, context.state)

    @app.train("unmask")
    def unmask(message: Message, context: Context) -> Message:
        return handle_unmask(message, context.state)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return handle_evaluate(message, opener(context), context.state, device(context))

    return app


def experiment(**overrides: Any) -> ExperimentConfig:
    """A small experiment; overrides by dotted keys with ``__`` for the dot."""
    table = {
        "name": "test",
        "base": {"id": "tiny"},
        "data": {"id": "tiny", "task": "classification"},
        "lora": {"rank": 2, "lora_alpha": 4, "target_modules": ["fc", "conv"]},
        "federation": {"rounds": 3, "cohort": 4, "local_steps": 5},
    }
    return ExperimentConfig.from_table(
        table, {key.replace("__", "."): value for key, value in overrides.items()}
    )


def start_adapter(config: ExperimentConfig) -> Adapter:
    return initial_adapter(SPECS, config.lora, config.seed, "ba5e" * 16)


def run(
    config: ExperimentConfig,
    out: Path,
    trainers: Mapping[int, FakeTrainer] | None = None,
    clients: int = 8,
    grid: Any = None,
    **options: Any,
) -> tuple[Any, list[RoundRecord]]:
    """Run a federation of fakes in process; return the state and the rounds of this call.

    options: of `run_federation`.
    """
    records: list[RoundRecord] = []
    state = run_federation(
        grid or InProcessGrid(fake_app(trainers), clients),
        config,
        out,
        initial=start_adapter(config),
        on_round=records.append,
        **options,
    )
    return state, records


class SlowTrainer(FakeTrainer):
    """Takes a while for each training, so that a run can be killed on its way."""

    def train(self, *args: Any) -> TrainResult:
        time.sleep(0.05)
        return super().train(*args)


def run_slowly(config: ExperimentConfig, out: Path) -> None:
    """Run a federation that is to be killed, in a process of its own."""
    run(config, out, {number: SlowTrainer(number, 10 + number) for number in range(8)})


class FaultyGrid(InProcessGrid):
    """A grid that passes every reply through `fault`, which returns the replies to deliver."""

    def __init__(
        self, fault: Callable[[Message, str], list[Message]], clients: int = 8, **options: Any
    ) -> None:
        super().__init__(fake_app(), clients, **options)
        self._fault = fault

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            client = f"c{reply.metadata.src_node_id - 1000}"
            yield from self._fault(reply, client)


def raises(error: type[Exception], text: str) -> Any:
    """``pytest.raises`` with the whole text, not a pattern."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")
