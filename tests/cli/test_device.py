"""fedlora device: from a bundle to a personal adapter and back, by commands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.device.session import Session
from fedlora.store import Store
from tests.device.hand_made import FEATURES, HandMade, write_classifier, write_language_model

COMMAND = ("device",)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"), buckets=((4, 16),))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_STATE", "state")


def write_windows(path: str, seed: int = 1) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(120, FEATURES)).astype(np.float32)
    np.savez(path, inputs=inputs, targets=(inputs @ generator.normal(size=(FEATURES, 3))).argmax(1))
    return inputs


def test_a_classifier_from_bundle_to_forgetting(run, ask, classifier: HandMade) -> None:
    inputs = write_windows("own.npz")
    shared = classifier.adapter(rank=3)
    fl.save_adapter(shared, "global.safetensors", provenance={"round": 7})

    assert run("init", "--bundle", classifier.folder, "--state", "state")[0] == 0
    assert ask("status")["serving"] == "base"
    assert run("install", "global.safetensors")[:2] == (
        0, f"state: {shared!r} installed; serving global\n"
    )  # fmt: skip
    found = ask("status")
    assert (found["serving"], found["personal"]) == ("global", None)
    assert found["global"]["provenance"] == {"round": 7}

    session = Session(classifier.folder, adapter=shared)
    expected = session.predict(inputs)
    predictions = ask("predict", "--inputs", "own.npz")
    assert [p["label"] for p in predictions] == [p.label for p in expected]
    assert predictions[0]["probability"] == pytest.approx(expected[0].probability, rel=1e-6)
    code, out, err = run("predict", "--inputs", "own.npz")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{expected[0].label}\t{expected[0].probability:.3g}"

    train = ("personalize", "--data", "own.npz", "--steps", 60, "--learning-rate", 0.02)
    code, out, err = run(*train, "--batch-size", 16)
    assert code == 0
    assert "trained on " in out
    assert "the new adapter is better: it is kept and served from now on" in out
    assert [line.split(",")[0] for line in err.splitlines()][-1] == "step 60/60"
    assert len(err.splitlines()) == 10
    personal = Store.open("state").personal_adapter()
    assert personal is not None
    assert personal.ranks == (3, 3)

    measured = ask("evaluate", "--data", "own.npz")["adapters"]
    assert list(measured) == ["base", "global", "personal"]
    assert measured["personal"]["loss"] < measured["global"]["loss"]
    status = ask("status")
    assert status["personal"]["metrics"]["after"] == measured["personal"]
    assert run("evaluate", "--data", "own.npz")[1].split()[:3] == ["adapter", "loss", "accuracy"]

    again = ask(*train, "--steps", 1, "--learning-rate", 1e-9, "--quiet")
    assert (again["kept"], again["replaced"]) == (False, "personal")
    assert Store.open("state").personal_adapter() == personal
    code, out, err = run(*train, "--steps", 1, "--learning-rate", 1e-9, "--quiet")
    assert (code, err) == (0, "")
    assert out.endswith("the new adapter is not better: it is dropped, personal is served on\n")

    fl.save_adapter(classifier.adapter(rank=2, seed=9), "next/")
    assert "fedlora device personalize" in run("install", "next/")[1]
    assert "stale" in run("status")[1]
    assert ask("status")["personal"]["stale"] is True

    assert ask("forget") == {"forgotten": True, "serving": "global"}
    assert ask("status")["personal"] is None
    assert run("forget")[:2] == (0, "there was nothing to erase; serving global\n")


def test_a_language_model_generates_suggests_and_learns(run, ask, language: HandMade) -> None:
    Path("messages.txt").write_text("the cat sat on the mat\n" * 30)
    assert run("init", "--bundle", language.folder, "--state", "state", "--in-place")[0] == 0
    session = Session(language.folder)
    text = "".join(session.generate("the cat", 8))
    assert ask("generate", "the cat", "--max-tokens", 8) == {"prompt": "the cat", "text": text}
    assert run("generate", "the cat", "--max-tokens", 8)[:2] == (0, f"the cat{text}\n")
    drawn = ("generate", "the", "--temperature", 2, "--top-k", 5, "--top-p", 0.9, "--seed")
    assert ask(*drawn, 1) == ask(*drawn, 1)
    assert len({ask(*drawn, seed)["text"] for seed in range(5)}) > 1

    words = session.suggest("the cat ", 3)
    found = ask("suggest", "the cat ")
    assert [(s["word"], s["probability"]) for s in found] == [
        (s.word, s.probability) for s in words
    ]
    done = ask("personalize", "--data", "messages.txt", "--steps", 40, "--learning-rate", 0.02)
    assert done["kept"]
    assert done["after"]["loss"] < done["before"]["loss"] / 2
    assert (done["train_examples"], done["held_out_examples"]) == (24, 6)
    # It has learnt its only sentence; the base has not.
    assert ask("generate", "the cat", "--max-tokens", 8)["text"] == " sat on the mat"
    assert ask("generate", "the cat", "--max-tokens", 8, "--adapter", "base")["text"] == text
    assert ask("suggest", "the cat ", "-k", 1)[0]["word"] == "sat"


def test_a_trial_with_a_client_of_a_data_set(run, ask, language: HandMade) -> None:
    assert run("init", "--bundle", language.folder, "--state", "state")[0] == 0
    code, out, err = run("evaluate", "--data", "chitchat-small")
    assert (code, out) == (2, "")
    client = err.split("such as ")[1].split(",")[0]
    found = ask("evaluate", "--data", "chitchat-small", "--client", client)
    assert found["held_out_examples"] > 20
    assert list(found["adapters"]) == ["base"]


REFUSED = {
    "no state": (["status", "--state", "nothing"], 1, ["nothing: expected a device's state"]),
    "no bundle": (["init", "--bundle", "x", "--state", "y"], 1, ["x: expected a bundle"]),
    "a state twice": (["init", "--bundle", "{bundle}", "--state", "state"], 1, ["already"]),
    "no adapter": (["install", "nothing"], 1, ["nothing: expected a PEFT folder"]),
    "another base": (["install", "other.safetensors"], 1, ["expected an adapter of the bundle"]),
    "other layers": (["install", "layers.safetensors"], 1, ["no factors for layer 'fc9'"]),
    "digest": (["install", "good.safetensors", "--sha256", "00" * 32], 1, ["expected SHA-256"]),
    "nothing to predict": (["predict"], 2, ["expected either texts or --inputs FILE"]),
    "text for features": (["predict", "hello"], 1, ["expected numbers, found text"]),
    "no personal": (
        ["predict", "--inputs", "own.npz", "--adapter", "personal"], 2,
        ["state has none", "fedlora device personalize"],
    ),
    "not a language model": (["suggest", "hello"], 2, ["found one for classification"]),
    "no data": (["personalize", "--data", "nothing.txt"], 1, ["nothing.txt: expected a file"]),
    "no data set": (["personalize", "--data", "watches"], 2, ["unknown data set 'watches'"]),
    "a client of nobody": (
        ["personalize", "--data", "watch", "--client", "9"], 2, ["unknown client of watch '9'"],
    ),
    "another kind": (
        ["evaluate", "--data", "chitchat", "--client", "x"], 2, ["found 'classification'"],
    ),
    "rate": (
        ["personalize", "--data", "own.npz", "--learning-rate", "0"], 2,
        ["learning_rate: expected a finite number > 0"],
    ),
}  # fmt: skip


@pytest.fixture
def prepared(run, classifier: HandMade) -> HandMade:
    run("init", "--bundle", classifier.folder, "--state", "state")
    write_windows("own.npz")
    good = classifier.adapter()
    fl.save_adapter(good, "good.safetensors")
    fl.save_adapter(fl.Adapter(good.layers, good.config, "cd" * 32), "other.safetensors")
    layers = fl.Adapter({"fc9": good["fc1"]}, good.config, good.base)
    fl.save_adapter(layers, "layers.safetensors")
    return classifier


@pytest.mark.parametrize(("arguments", "code", "texts"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_and_changes_nothing(
    run, prepared: HandMade, arguments: list[str], code: int, texts: list[str]
) -> None:
    before = Path("state", "state.json").read_bytes()
    found, out, err = run(*(word.format(bundle=prepared.folder) for word in arguments))
    assert (found, out) == (code, "")
    assert err.startswith("fedlora: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err
    assert Path("state", "state.json").read_bytes() == before


def test_a_changed_tokenizer_encodes_no_data(run, language: HandMade) -> None:
    Path("messages.txt").write_text("the cat sat on the mat\n" * 30)
    assert run("init", "--bundle", language.folder, "--state", "state")[0] == 0
    path = Path("state", "bundle", "tokenizer.json")
    for found in (path.read_bytes() + b" ", b'{"x":'):
        path.write_bytes(found)
        for command in ("personalize", "evaluate"):
            code, out, err = run(command, "--data", "messages.txt")
            assert (code, out, err.count("\n")) == (1, "", 1)
            assert "tokenizer.json: expected" in err
            assert "the bundle is damaged" in err


def test_other_peoples_numbers_are_shown_as_far_as_they_are_known(run, prepared: HandMade) -> None:
    for metrics in ({}, {"after": 3}, {"before": {}, "after": {"loss": "x"}}):
        Store.open("state").commit_personal(fl.load_adapter("good.safetensors"), metrics)
        code, out, err = run("status")
        assert (code, err) == (0, "")
        assert "held-out" not in out


def test_a_busy_state_is_one_line(run, prepared: HandMade) -> None:
    with Store.open("state").lock():
        code, out, err = run("personalize", "--data", "own.npz")
        assert (code, out) == (1, "")
        assert err == "fedlora: state: another process is writing to this state; wait for it\n"
        assert run("predict", "--inputs", "own.npz")[0] == 0, "reading goes on"
