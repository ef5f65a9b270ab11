"""What a device keeps of a federation in its owner's folder, and what of it outlives a restart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedlora.adapter import Adapter
from fedlora.errors import FederationError, StoreError
from fedlora.federation import handle_evaluate, read_checkpoint
from fedlora.federation.device_state import DeviceState, owners_state, waiting_lock
from fedlora.federation.own_rows import ContextRows
from fedlora.flat import segments_of
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.local import LocalNoise
from fedlora.simulation.grid import InProcessGrid
from fedlora.store import RunRows, Store
from tests.federation.fakes import FakeTrainer, FaultyGrid, experiment, fake_app, raises, run
from tests.federation.test_stage import message, order, staged
from tests.store.states import adapter

HOSTILE = ("../../outside", "/tmp/outside", "..", "a/../../b")


class Forgetful(InProcessGrid):
    """Every message finds a new process: nothing is left of `Context.state`."""

    def _keep_state(self, node: int, context: Any) -> None:
        pass


def grid(states: Path | None, trainers: Any = None, clients: int = 4) -> InProcessGrid:
    return Forgetful(fake_app(trainers, states), clients)


def difference(one: Adapter, other: Adapter) -> float:
    return max(
        max(np.abs(one[p].A - other[p].A).max(), np.abs(one[p].B - other[p].B).max()) for p in one
    )


def test_the_global_and_the_personal_adapter_are_kept(tmp_path: Path) -> None:
    states = tmp_path / "states"
    staged(experiment(), tmp_path / "run", grid=grid(states))
    whole = read_checkpoint(tmp_path / "run").state.adapter
    served = set()
    for number in range(4):
        store = Store.open(states / str(number))
        status = store.status()
        assert store.global_adapter() == whole
        assert status.installed is not None
        assert status.personal is not None
        assert status.installed.provenance == {"run": "test", "round": 3, "method": "fedit"}
        assert status.personal.started_from == whole.fingerprint()
        scores = status.personal.metrics["scores"]
        assert set(scores) == {"base", "own", "global", "personal"}
        assert scores["global"]["secret"] == 10 + number  # it stays here, where it may be anything
        personal = store.serving()
        assert personal is not None
        assert difference(personal, whole) > 0.1
        served.add(personal.fingerprint())
    assert len(served) == 4


def test_another_run_puts_its_adapters_in_their_place(tmp_path: Path) -> None:
    states = tmp_path / "states"
    staged(experiment(), tmp_path / "one", grid=grid(states))
    staged(experiment(seed=1), tmp_path / "two", grid=grid(states))
    store = Store.open(states / "2")
    assert store.global_adapter() == read_checkpoint(tmp_path / "two").state.adapter
    assert store.status().commits == 2
    assert len(list((store.path / "adapters").iterdir())) == 2


def test_who_keeps_the_global_adapter_has_no_personal_one(tmp_path: Path) -> None:
    keeping = {"personalization__keep_better": True, "data__validation_share": 0.1}
    trainers = {2: FakeTrainer(2, 12, overfitted=("validation",))}
    staged(experiment(**keeping), tmp_path / "run", grid=grid(tmp_path, trainers))
    assert Store.open(tmp_path / "2").personal_adapter() is None
    assert Store.open(tmp_path / "2").serving() == Store.open(tmp_path / "1").global_adapter()
    assert Store.open(tmp_path / "1").personal_adapter() is not None


def test_own_factors_survive_restarts_and_a_resumed_run(tmp_path: Path) -> None:
    """Every message in a process of its own, and the server started anew: as in one process."""
    sa = {"federation__method": "fedsa-lora", "federation__cohort": 3}
    whole, kept = InProcessGrid(fake_app(), 4), {}
    run(experiment(**sa, federation__rounds=4), tmp_path / "whole", grid=whole)
    for rounds in (2, 4):
        config = experiment(**sa, federation__rounds=rounds)
        run(config, tmp_path / "run", grid=grid(tmp_path / "states"))
    state, name = read_checkpoint(tmp_path / "run").state, read_checkpoint(tmp_path / "run").run
    segments = segments_of(state.trainable, {"B"})
    for k in range(4):
        rows = RunRows(Store.open(tmp_path / "states" / str(k)), name)
        kept[k] = rows.read("own-factors", segments, 5)
        expected = ContextRows(whole._states[1000 + k]).read("own-factors", segments, 5)
        np.testing.assert_array_equal(kept[k], expected)
    assert len({row.tobytes() for row in kept.values()}) == 4


def test_another_run_does_not_go_on_from_an_older_ones_factors(tmp_path: Path) -> None:
    starts: dict[Any, float] = {}

    class Watched(FakeTrainer):
        def train(self, broadcast: Any, config: Any, rule: Any, round: Any, seed: int) -> Any:
            if self.number == 1:
                starts[round] = max(
                    float(np.abs(layer.B).max()) for layer in broadcast.trainable.layers.values()
                )
            return super().train(broadcast, config, rule, round, seed)

    sa = {"federation__method": "fedsa-lora", "federation__cohort": 4}
    trainers = {k: Watched(k) for k in range(4)}
    for name in ("one", "two"):
        run(experiment(**sa), tmp_path / name, grid=grid(tmp_path / "states", trainers))
        assert [starts[number] > 0 for number in (1, 2, 3)] == [False, True, True]
        starts.clear()


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_the_server_sends_names_a_path(name: str, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b" / "home"
    device = DeviceState(home / "state")
    trainer = FakeTrainer(1, client_id=name)
    sent = message(order(name=name, method=name, kept=frozenset({"B"})))
    sent.content["setup"]["run"] = name
    sent.content["setup"]["data/id"] = name
    reply = handle_evaluate(sent, lambda setup: trainer, None, device)
    assert reply.has_content()
    made = {path.relative_to(tmp_path).parts[:4] for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {("a", "b", "home", "state")}
    store = Store.open(home / "state")
    assert {path.parent.name for path in store.path.rglob("*.safetensors")} == {"adapters"}
    status = store.status()
    assert status.installed is not None
    assert status.installed.provenance["run"] == name


def test_a_quiet_device_keeps_its_adapters_and_tells_no_score(tmp_path: Path) -> None:
    replies = {}
    for quiet in (False, True):
        device = DeviceState(tmp_path / str(quiet))
        replies[quiet] = handle_evaluate(
            message(), lambda setup: FakeTrainer(1), None, device, quiet=quiet
        )
        assert Store.open(device.folder).status().installed is not None
    assert "personal.loss" in replies[False].content["scores"]
    assert dict(replies[True].content["scores"]) == {}


def test_a_state_of_another_base_is_refused_before_the_training(tmp_path: Path) -> None:
    Store.create_without_bundle(tmp_path / "state", "ab" * 32)
    trainer = FakeTrainer(1)
    device = DeviceState(tmp_path / "state")
    reply = handle_evaluate(message(), lambda setup: trainer, None, device)
    assert reply.error.reason == (
        "FederationError: this client's state is of the base abababababab, its trainer's is "
        "ba5eba5eba5e; name another folder in the node config's state"
    )
    assert trainer.trained == {}


def test_a_training_that_diverges_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store.create_without_bundle(tmp_path / "state", "ba5e" * 16)
    old = replace(adapter(1), base="ba5e" * 16)
    store.install_both(old, None, provenance={}, metrics={})

    def diverges(result: Any, round: Any) -> Any:
        raise FederationError("no")

    device = DeviceState(tmp_path / "state")
    trainer = FakeTrainer(1, change=diverges)
    assert handle_evaluate(message(), lambda setup: trainer, None, device).has_error()
    assert store.serving() == old


def test_a_path_of_the_device_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    device = DeviceState(tmp_path / "state")
    reply = handle_evaluate(message(), lambda setup: FakeTrainer(1), None, device)
    assert str(tmp_path) not in reply.error.reason
    assert reply.error.reason.startswith("StoreError at store.py:")


def test_without_a_run_there_is_no_place_for_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="expected the run's name beside what this client"):
        DeviceState(tmp_path / "state").rows("ba5e" * 16, None)


def test_another_process_that_holds_the_state_is_waited_for(tmp_path: Path) -> None:
    store = Store.create_without_bundle(tmp_path / "state", "ba5e" * 16)
    code = (
        "import sys, time; from fedlora.store import Store\n"
        "with Store.open(sys.argv[1]).lock():\n"
        "    print('held', flush=True); sys.stdin.readline()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.path)], stdin=pipe, stdout=pipe, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        started = time.monotonic()
        with pytest.raises(StoreError, match="another process"), waiting_lock(store, 0.3):
            pass
        assert time.monotonic() - started >= 0.3
        other.stdin.close()
        with waiting_lock(store):
            pass


def test_processes_at_the_same_time_each_note_what_they_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = "ba5e" * 16, tmp_path / "state"
    Store.create_without_bundle(folder, base)
    read = Ledger.read

    def slowly(out: Path) -> Ledger:
        found = read(out)
        time.sleep(0.05)  # so that the others read before this one writes, if they may
        return found

    monkeypatch.setattr(Ledger, "read", slowly)

    def note(round: int) -> None:
        DeviceState(folder).note_release(base, round, LocalNoise(0.5, 1.0))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(note, range(1, 4)))
    lines = read(folder).lines
    assert [line.round for line in lines] == [1, 2, 3]
    assert {line.notes for line in lines} == {("round 1",), ("round 2",), ("round 3",)}


def test_the_owner_alone_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_STATE", str(tmp_path))
    assert owners_state({}) is None
    found = owners_state({"state": "here", "bundle": str(tmp_path)})
    assert found == DeviceState(Path.cwd() / "here", tmp_path)


def test_a_run_is_named_only_where_clients_keep_something(tmp_path: Path) -> None:
    seen: dict[str, set[Any]] = {}

    class Listening(InProcessGrid):
        def replies(self, messages: Any) -> Any:
            def heard(message: Message) -> Message:
                told = message.content["setup"].get("run")
                seen.setdefault(message.metadata.message_type, set()).add(told)
                return message

            return super().replies(map(heard, messages))

    staged(experiment(), tmp_path / "fedit", grid=Listening(fake_app(), 4))
    assert seen == {"query": {None}, "train": {None}, "evaluate": {None}}
    seen.clear()
    config = experiment(federation__method="fedsa-lora")
    staged(config, tmp_path / "fedsa", grid=Listening(fake_app(), 4))
    name = read_checkpoint(tmp_path / "fedsa").run
    assert seen == {"query": {name}, "train": {name}, "evaluate": {name}}


def test_clients_say_whether_they_remember(tmp_path: Path) -> None:
    def told(states: Path | None, method: str) -> list[Any]:
        answers = []

        def fault(reply: Message, client: str) -> list[Message]:
            if reply.metadata.message_type == "query":
                answers.append(reply.content["client"].get("remembers"))
            return [reply]

        class Grid(FaultyGrid):
            def __init__(self) -> None:
                super().__init__(fault, 4)
                self._app = fake_app(None, states)

        config = experiment(federation__method=method, federation__rounds=1)
        run(config, tmp_path / f"{states is None}{method}", grid=Grid())
        return answers

    assert told(None, "fedit") == told(tmp_path / "states", "fedit") == [None] * 4
    assert told(None, "fedsa-lora") == [False] * 4
    assert told(tmp_path / "states", "fedsa-lora") == [True] * 4


def test_the_states_of_two_devices_do_not_meet(tmp_path: Path) -> None:
    states = tmp_path / "states"
    staged(experiment(), tmp_path / "run", grid=grid(states))
    with raises(
        StoreError, f"{states / '1'}: there is a device's state already; name another folder"
    ):
        Store.create_without_bundle(states / "1", "ab" * 32)
