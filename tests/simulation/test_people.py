"""Who is evaluated, and with which global adapter."""

from shutil import copyfile

import pytest

from fedlora.adapter import LoraConfig
from fedlora.bases import tokenizer_file
from fedlora.errors import ConfigError
from fedlora.evaluation import evaluate
from fedlora.experiment import BaseConfig, DataConfig, ExperimentConfig
from fedlora.nn import Task
from fedlora.simulation import simulate
from fedlora.simulation.folder import read_rows
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
