"""Who is evaluated, and with which global adapter."""

from dataclasses import replace
from shutil import copyfile

import numpy as np
import pytest

from fedlora.adapter import LoraConfig
from fedlora.bases import tokenizer_file
from fedlora.errors import ConfigError
from fedlora.evaluation import evaluate
from fedlora.experiment import BaseConfig, DataConfig, EngineConfig, ExperimentConfig
from fedlora.federation.checkpoint import ClientRecord
from fedlora.federation.folder import read_rows
from fedlora.formats import load_adapter
from fedlora.nn import Task
from fedlora.simulation import people as people_module
from fedlora.simulation import simulate
from fedlora.simulation.people import cross_evaluate, evaluate_clients
from fedlora.world import open_world

SHORT = {
    "data.clients": 3,
    "federation.cohort": 2,
    "federation.local_steps": 1,
    "federation.rounds": 1,
    "personalization.steps": 1,
    "personalization.cross": 2,
}


def test_a_client_without_held_out_examples_takes_part_and_is_not_evaluated(tmp_path):
    uneven = SHORT | {"data.clients": 30, "data.partition": "dirichlet:0.05"}
    run = simulate("watch", overrides=uneven, out=tmp_path / "run")
    left = 30 - run.summary["clients"]
    assert left > 0
    note = f"{left} clients without held-out examples are not evaluated"
    assert run.summary["extra"]["notes"][-1] == note
    assert run.table().endswith(f"note: {note}")


def test_rows_of_another_global_adapter_are_computed_again(tmp_path):
    """A run that is resumed for more rounds must not keep what fewer rounds gave."""
    out = tmp_path / "run"
    simulate("watch", overrides=SHORT, out=out)
    (out / "summary.json").unlink()
    toml = out / "experiment.toml"
    toml.write_text(toml.read_text().replace("rounds = 1\n", "rounds = 2\n"))
    longer = simulate(resume=out)
    fresh = simulate("watch", overrides=SHORT | {"federation.rounds": 2}, out=tmp_path / "fresh")
    assert longer.adapter == fresh.adapter
    assert [row["scores"] for row in longer.clients] == [row["scores"] for row in fresh.clients]
    assert longer.summary["extra"]["cross"] == fresh.summary["extra"]["cross"]
    rows = read_rows(out / "clients.jsonl")
    assert {row["global"] for row in rows} == {fresh.adapter.fingerprint()}
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("sums", "text"),
    [
        ({"hits": 1.0}, "expected its score to return 'nats' and 'tokens' or 'examples'"),
        ({"nats": 1.0, "examples": 2.0}, "expected its score to give its metric 'accuracy'"),
    ],
)
def test_a_task_that_does_not_score_what_it_has_to_is_refused(sums, text):
    config = ExperimentConfig.from_toml("simulations/watch.toml")
    world = open_world(config.base, config.data, config.lora, 0)
    task = Task("mine", "accuracy", True, lambda m, b: None, lambda m, b: sums)
    examples = world.data.client("1_left").test
    with pytest.raises(ConfigError, match=f"task 'mine': {text}"):
        evaluate(world.model, world.initial, examples, task, "client")


def test_a_base_with_another_number_of_classes_is_refused(tmp_path, monkeypatch):
    (tmp_path / "five.py").write_text(
        "import numpy as np\n"
        "from fedlora.data import FederatedData, load_data\n"
        "from dataclasses import replace\n"
        "def data():\n"
        "    return replace(load_data('watch'), labels=tuple('abcde'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ExperimentConfig.from_toml("simulations/watch.toml")
    data = DataConfig("five:data", "classification")
    with pytest.raises(ConfigError, match="tells 7 classes apart, and 'five:data' has 5"):
        open_world(BaseConfig("watch-cnn"), data, config.lora, 0)


def test_an_encoder_needs_a_head_and_predicts_no_tokens(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=2100, num_hidden_layers=1, **sizes)).save_pretrained(folder)
    copyfile(tokenizer_file("tiny-chat"), folder / "tokenizer.json")
    base = BaseConfig(str(folder))
    with pytest.raises(ConfigError, match=r"has no head, .* set base\.num_classes = 5"):
        open_world(base, DataConfig("chitchat-punctuation", "classification", 2), LoraConfig(), 0)
    with pytest.raises(ConfigError, match="is an encoder and cannot predict tokens; use a"):
        open_world(base, DataConfig("chitchat", "next-token", 2), LoraConfig(), 0)


def test_a_new_head_that_is_not_adapted_is_refused():
    """It is zero, so that nothing would ever reach what is below it."""
    base, data = BaseConfig("tiny-chat", 5), DataConfig("chitchat-punctuation", "classification", 2)
    for lora in (LoraConfig(layers="last:1"), LoraConfig(target_modules=("q_proj",))):
        with pytest.raises(ConfigError, match="the new head 'zero_head' among the adapted layers"):
            open_world(base, data, lora, 0)


LINEAR = {
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification", "clients": 7},
    "lora": {"rank": 2, "target_modules": ["hidden", "classifier"]},
    "federation": {"cohort": 2, "local_steps": 1, "batch_size": 4, "learning_rate": 5e-3},
    "personalization": {"steps": 3},
}


def last_stage(folder, kind, *, report=lambda *_: None, personal=False, learning_rate=5e-3):
    """The last stage alone, for seven clients of different numbers of steps."""
    overrides = {"engine.kind": kind, "personalization.learning_rate": learning_rate}
    config = ExperimentConfig.from_table({"name": "linear", **LINEAR}, overrides)
    world = open_world(config.base, config.data, config.lora, config.seed)
    ids = world.data.client_ids
    folder.mkdir(exist_ok=True)
    rows = evaluate_clients(
        world,
        config,
        world.initial,
        took_part=[ClientRecord(c, rounds=k % 3, steps=k % 3) for k, c in enumerate(ids)],
        file=folder / "clients.jsonl",
        keep_own={c: folder / f"own-{c}.safetensors" for c in ids[:2]},
        keep_personal={c: folder / f"personal-{c}.safetensors" for c in ids if personal},
        report=report,
        seconds=lambda: 1.0,
    )
    own = {c: folder / f"own-{c}.safetensors" for c in ids[:2]}
    matrix = None
    if all(path.is_file() for path in own.values()):
        matrix = cross_evaluate(world, config, own, lambda *_: None)
    return rows, matrix


def assert_same_rows(found, expected):
    assert [row["client"] for row in found] == [row["client"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in ("scores", "seconds")} == {
            k: v for k, v in other.items() if k not in ("scores", "seconds")
        }
        for name, scores in other["scores"].items():
            # rounding of float32, through a few steps of AdamW
            assert row["scores"][name] == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_windows_of_clients_give_the_rows_of_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(people_module, "WINDOWS", 1)  # windows of several clients
    seen = []
    found, matrix = last_stage(
        tmp_path / "cohort", "cohort", report=lambda *args: seen.append(args), personal=True
    )
    expected, slow_matrix = last_stage(tmp_path / "sequential", "sequential", personal=True)
    assert_same_rows(found, expected)
    assert [done for done, _, _ in seen] == list(range(8))
    assert [client for _, _, client in seen[1:]] == [row["client"] for row in found]
    assert read_rows(tmp_path / "cohort" / "clients.jsonl") == [r | {"seconds": 1.0} for r in found]
    for name in ("own-1_right.safetensors", "personal-4_left.safetensors"):
        mine = load_adapter(tmp_path / "cohort" / name)
        for path, layer in load_adapter(tmp_path / "sequential" / name).layers.items():
            np.testing.assert_allclose(mine[path].B, layer.B, atol=1e-4)
    assert matrix["clients"] == slow_matrix["clients"]
    for row, other in zip(matrix["values"], slow_matrix["values"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_a_killed_stage_goes_on_after_its_last_window(tmp_path, monkeypatch):
    whole, _ = last_stage(tmp_path / "whole", "cohort")

    class Killed(Exception):
        pass

    def kill(done, total, client):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        last_stage(tmp_path / "cut", "cohort", report=kill)
    written = read_rows(tmp_path / "cut" / "clients.jsonl")
    assert [row["client"] for row in written] == [row["client"] for row in whole[:3]]
    started = []
    monkeypatch.setattr(
        people_module,
        "compare_many",
        lambda *args, **kwargs: started.append(args[1]) or real(*args, **kwargs),
    )
    resumed, _ = last_stage(tmp_path / "cut", "cohort")
    assert_same_rows(resumed, whole)
    todo = [data.client_id for window in started for data, _ in window]
    assert sorted(todo) == [row["client"] for row in whole[3:]]
    assert len(read_rows(tmp_path / "cut" / "clients.jsonl")) == 7


real = people_module.compare_many


def test_clients_that_diverge_are_rows_with_the_reason(tmp_path):
    found, _ = last_stage(tmp_path / "cohort", "cohort", learning_rate=1e30)
    expected, _ = last_stage(tmp_path / "sequential", "sequential", learning_rate=1e30)
    assert found == expected
    assert found[0]["failed"].startswith("client '1_right': ")


def test_no_window_is_larger_than_allowed_and_every_thread_has_several():
    config = ExperimentConfig.from_table({"name": "linear", **LINEAR})
    many = [str(k) for k in range(1000)]
    windows = people_module._windows(many, config)
    assert [c for window in windows for c in window] == many
    assert max(map(len, windows)) == people_module.WINDOW
    assert {len(w) for w in people_module._windows(many[:8], config)} == {1}
    alone = replace(config, engine=EngineConfig("sequential"))
    assert {len(w) for w in people_module._windows(many, alone)} == {1}


def test_the_rows_say_who_keeps_the_global_adapter(tmp_path):
    keep = SHORT | {"personalization.keep_better": True, "data.validation_share": 0.1}
    diverging = keep | {"personalization.learning_rate": 0.5, "personalization.steps": 3}
    run = simulate("watch", overrides=diverging, out=tmp_path / "run")
    kept = [row["client"] for row in run.clients if row["kept_global"]]
    assert len(kept) == run.summary["extra"]["kept_global"] > 0
    digest = run.adapter.fingerprint()
    for client in kept:
        saved = load_adapter(tmp_path / "run" / "personal" / f"{client}.safetensors")
        assert saved.fingerprint() == digest
    plain = simulate("watch", overrides=SHORT, out=tmp_path / "plain")
    assert "kept_global" not in plain.clients[0]
