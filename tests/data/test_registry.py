"""Data sets by name, resampling, and what a user's function may return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fedlora.data import ClientData, Examples, FederatedData, list_data, load_data
from fedlora.data.chitchat import read_messages
from fedlora.data.registry import PARTITIONS
from fedlora.data.watch import BASE_PERSONS, CLIENT_PERSONS, WINDOW, read_client, recordings
from fedlora.errors import ConfigError, DataError, UnknownNameError


def test_the_list_says_how_much_there_is() -> None:
    info = {entry.id: entry for entry in list_data()}
    assert sorted(info) == [
        "chitchat", "chitchat-authors", "chitchat-punctuation", "chitchat-small", "watch",
    ]  # fmt: skip
    for name, file in (
        ("chitchat", "chitchat_117x1000.jsonl.gz"),
        ("chitchat-small", "chitchat_12x400.jsonl.gz"),
    ):
        messages = read_messages(file)
        assert info[name].clients == len(messages)
        assert info[name].examples == sum(map(len, messages.values()))
    parts = [(c.train, c.test) for c in load_data("watch").clients()]
    assert info["watch"].examples == sum(len(train) + len(test) for train, test in parts)
    assert info["watch"].clients == len(parts)


def test_watch_has_the_persons_whom_its_base_has_not_seen() -> None:
    clients, base = load_data("watch").client_ids, load_data("watch", group="base").client_ids
    assert {name.split("_")[0] for name in clients} == set(CLIENT_PERSONS)
    assert {name.split("_")[0] for name in base} == set(BASE_PERSONS)
    assert not set(clients) & set(base)
    assert len(clients) == len(base) == 10


def test_windows_of_train_validation_and_test_share_no_sample() -> None:
    data = read_client("1_left", 0.2, 0.2)
    signal = recordings()["1_left_0"]
    cuts = (int(0.6 * len(signal)), int(0.8 * len(signal)))
    for part, start, stop in (
        (data.train, 0, cuts[0]),
        (data.validation, *cuts),
        (data.test, cuts[1], len(signal)),
    ):
        mine = part.inputs[part.targets == 0]
        piece = signal[start:stop].T / 1000
        assert len(mine) == (stop - start - WINDOW) // 25 + 1
        assert np.allclose(mine[0], piece[:, :WINDOW])
        assert np.allclose(mine[-1], piece[:, 25 * (len(mine) - 1) :][:, :WINDOW])


def test_chitchat_is_cut_by_time(tokenizer: Tokenizer) -> None:
    data = load_data("chitchat-small", tokenizer=tokenizer, validation_share=0.1)
    messages = read_messages("chitchat_12x400.jsonl.gz")
    for client in data.clients():
        count = len(messages[client.client_id])
        sizes = [len(part) for part in (client.train, client.validation, client.test)]
        assert sum(sizes) == count
        assert sizes[2] == count - int(0.8 * count)
    first = tokenizer.encode(messages[data.client_ids[0]][0]).ids
    assert next(data.clients()).train.targets[0][: len(first)].tolist() == first


def test_punctuation_hides_the_ending_it_asks_for(tokenizer: Tokenizer) -> None:
    data = load_data("chitchat-punctuation", tokenizer=tokenizer, clients=2, seed=1)
    assert data.labels == (".", "!", "?", "…", "none")
    for client in data.clients():
        assert client.train.targets.ndim == 1
        for ids, label in zip(client.test.inputs, client.test.targets, strict=True):
            text = tokenizer.decode(ids.tolist())
            assert label == 4 or not text.endswith((".", "!", "?", "…"))


def test_authors_are_the_twenty_with_most_messages_cut_by_time(tokenizer: Tokenizer) -> None:
    messages = read_messages("chitchat_117x1000.jsonl.gz")
    data = load_data("chitchat-authors", tokenizer=tokenizer)
    info = next(entry for entry in list_data() if entry.id == data.id)
    assert len(data) == info.clients == len(info.labels or ()) == 20
    assert info.examples == sum(len(messages[author]) for author in data.client_ids)
    fewest = min(len(messages[author]) for author in data.client_ids)
    assert fewest >= max(len(m) for user, m in messages.items() if user not in data.client_ids)
    for label, author in enumerate(data.client_ids):
        client = data.client(author)
        assert set(client.train.targets) == set(client.test.targets) == {label}
        count = len(messages[author])
        assert (len(client.train), len(client.test)) == (int(0.8 * count), count - int(0.8 * count))
        last = tokenizer.encode(messages[author][-1], add_special_tokens=False).ids[:63]
        found = client.test.inputs[-1]
        assert found[found != 0].tolist() == last


@pytest.mark.parametrize("partition", ["dirichlet:0.1", "dirichlet:1.0", "iid"])
def test_authors_are_dealt_out_alike_in_training_and_test(
    tokenizer: Tokenizer, partition: str
) -> None:
    options = {"tokenizer": tokenizer, "partition": partition, "validation_share": 0.1}
    data = load_data("chitchat-authors", clients=12, **options)
    counts = {
        part: np.array(
            [np.bincount(getattr(c, part).targets, minlength=20) for c in data.clients()]
        )
        for part in ("train", "validation", "test")
    }
    total = {part: table.sum(0) for part, table in counts.items()}  # by author
    assert sum(table.sum() for table in counts.values()) == 20_000
    assert (total["test"] == 200).all()
    shares = {part: table / total[part] for part, table in counts.items()}
    if partition == "iid":
        # Each message goes to a client at random: 5 standard deviations of a binomial's share.
        for part, share in shares.items():
            assert abs(share - 1 / 12).max() < 5 * np.sqrt(1 / 12 * 11 / 12 / total[part].min())
        return
    for part in ("validation", "test"):
        # By equal shares; a share lies between two cuts, each rounded to half a message at most,
        # here and in training, where a client without a message is given one.
        most = 1 / total[part].min() + 2 / total["train"].min()
        assert abs(shares[part] - shares["train"]).max() <= most + 1e-9
    # The skew is there: the client with most of an author has more than half, or under a third.
    most = shares["train"].max(0).mean()
    assert (most > 0.5) if partition == "dirichlet:0.1" else (most < 0.33)


def test_fewer_clients_are_a_random_choice_that_the_seed_decides() -> None:
    some = load_data("watch", clients=4).client_ids
    assert load_data("watch", clients=4).client_ids == some
    assert set(some) < set(load_data("watch").client_ids)
    assert any(load_data("watch", clients=4, seed=s).client_ids != some for s in (1, 2, 3))


def test_more_clients_are_copies_and_a_note_says_so() -> None:
    data = load_data("watch", clients=25)
    copies = [name for name in data.client_ids if "#" in name]
    assert len(data) == 25
    assert len(copies) == 15
    assert data.notes == (
        "25 clients were asked for and there are 10: 15 of them are copies, drawn with replacement",
    )
    copy = data.client(copies[0])
    original = data.client(copies[0].partition("#")[0])
    assert copy.client_id == copies[0]
    assert copy.train is original.train


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"id": "wach"}, UnknownNameError, "unknown data set 'wach'; did you mean 'watch'?"),
    ({"id": "watch", "task": "next-token"}, ConfigError, "is for 'classification', found"),
    ({"id": "watch", "group": "bas"}, UnknownNameError, "unknown group of data 'watch' 'bas'"),
    ({"id": "watch", "clients": 0}, ConfigError, "clients: expected a whole number >= 1, found 0"),
    ({"id": "watch", "test_share": 1.0}, ConfigError, "expected fractions in"),
    (
        {"id": "watch", "test_share": 0.5, "validation_share": 0.5},
        ConfigError,
        "expected less than 1",
    ),
    ({"id": "watch", "max_length": 0}, ConfigError, "max_length: expected a whole number"),
    ({"id": "chitchat"}, ConfigError, "tokenizer: this data is text"),
    ({"id": "nowhere:data"}, ConfigError, "data: cannot import 'nowhere:data'"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        load_data(**options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_client_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown client of watch '1_lef'; did you mean"):
        load_data("watch").client("1_lef")


def test_partitions_are_those_of_the_experiment_file() -> None:
    assert PARTITIONS == ("dirichlet", "iid", "natural")


FUNCTIONS = """
import numpy as np

def arrays():
    return {name: {"inputs": np.ones((10, 3)), "targets": np.arange(10) % 2} for name in "ab"}

def messages():
    return {"ann": ["hello there"] * 5, "bob": ["bye now"] * 10}

def nothing():
    return {"ann": {"inputs": np.ones((0, 3)), "targets": np.ones(0, int)}}

def wrong():
    return [1, 2]

def strange():
    return {"ann": {"x": 1}}

def marked():
    return {"ann#2": ["hi"]}

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_data.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_data"


def test_a_function_may_return_arrays_by_client(module: str) -> None:
    data = load_data(f"{module}:arrays")
    assert data.task == "classification"
    client = data.client("b")
    assert [len(part) for part in (client.train, client.validation, client.test)] == [8, 0, 2]
    assert client.test.targets.tolist() == [0, 1]


def test_a_function_may_return_messages_by_client(module: str, tokenizer: Tokenizer) -> None:
    data = load_data(f"{module}:messages", tokenizer=tokenizer)
    assert data.task == "next-token"
    assert len(data.client("bob").test) == 2
    assert data.client("ann").train.characters is not None


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        ("nothing", DataError, "client 'ann': expected at least one training example"),
        ("wrong", DataError, "expected a FederatedData or a mapping"),
        ("strange", DataError, "client 'ann': expected ClientData, Examples, a list of messages"),
        ("marked", DataError, "without '#', found 'ann#2'"),
        ("number", ConfigError, "to be a function, found int"),
        ("absent", ConfigError, "cannot import"),
    ],
)
def test_what_a_function_cannot_return_is_refused(
    module: str, function: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        load_data(f"{module}:{function}")


def test_a_client_is_read_once_and_only_when_asked_for() -> None:
    asked: list[str] = []
    part = Examples(np.ones((1, 1)), np.zeros(1, int))

    def read(client_id: str) -> Any:
        from fedlora.data import ClientData

        asked.append(client_id)
        return ClientData(client_id, part, part, part)

    data = FederatedData("x", "classification", ("a", "b"), read)
    assert asked == []
    data.client("b"), data.client("b")
    assert asked == ["b"]


def test_the_data_of_so_many_clients_is_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.data.client.KEPT", 2)
    read: list[str] = []

    def reading(client_id: str) -> ClientData:
        read.append(client_id)
        examples = Examples(np.zeros((1, 2)), np.zeros(1, np.int64))
        return ClientData(client_id, examples, examples, examples)

    data = FederatedData("d", "classification", ("a", "b", "c"), reading)
    for client_id in ("a", "b", "a", "c", "b", "a"):
        assert data.client(client_id).client_id == client_id
    assert read == ["a", "b", "c", "a"]  # b stayed when c came, a had to be read again
