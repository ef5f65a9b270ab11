"""The page's modules beside Python's: the same tokens, batches, bytes, steps and sums.

One run of Node answers for all cases; without Node these tests are skipped.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fedlora as fl
from fedlora.data import draw_batches
from fedlora.data.chitchat import read_messages
from fedlora.data.examples import Examples
from fedlora.data.text import encode_messages, load_tokenizer
from fedlora.device.buckets import pieces_of
from fedlora.device.manifest import FileInfo, GraphInfo, Manifest, write_manifest
from fedlora.device.optimizers import AdamW
from fedlora.device.scoring import next_token_sums
from fedlora.device.suggest import Words, split_text
from fedlora.formats.packed import encode_packed
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "fedlora" / "bases" / "files" / "tiny-chat" / "tokenizer.json"
NODE = shutil.which("node")
LONGEST = 32
BATCHES = [(1, 3, 8, 0), (5, 4, 8, 0), (13, 9, 4, 1), (200, 30, 8, 2)]  # count, steps, size, seed
LENGTHS = [[3], [3, 9, 2, 30, 5, 5, 1, 8], [17, 33, 64, 2], [40] * 9]
ODD = [
    "I'll we're don't HE'S 'tis it''s", "a  b   c ", "tab\there", "nbsp\u00a0here\u0085next",
    "naïve café Ünïcödé", "cafe\u0301", "数字１２３ ½ Ⅷ", "😀👍🏽 family 👩‍👩‍👧", "x\ufeffy",
    "٣٤ हिन्दी ไทย",
    "before<|endoftext|>after", "...!!??", "http://a.b/c?d=1&e=2", "\u2028line", "0123 45a6",
]  # fmt: skip
TYPED = [
    "see you at th", "see you at the ", "", "  ", "don't kn", "it’", "it’s", "well,", "(ab",
    "a 😀 b",     "naïv", "x\u00a0", "'", "o'c", "1st pla", "e\u0301a",
]  # fmt: skip
ALLOWED = [["", " "], [" th", " th"], ["", " th"], [" t", " the"], ["", "th"], ["", " Ã©"]]
SHARES = [0.2, 0.33, 0.5, 0.05]
FLOATS = [0.0, 1.0, 16.0, 2.5, 0.1, 1e-5, 1.5e-7, 1e15, 1e16, 1.25e22, 123456.789, 1 / 3, 1e-4]
GRADIENTS = 40


def text(array: npt.NDArray[Any] | bytes) -> str:
    data = array if isinstance(array, bytes) else array.tobytes()
    return base64.b64encode(data).decode()


def manifest() -> Manifest:
    """Of a bundle with three kinds of layers and two train graphs; its files do not matter."""
    names = ("base.onnx.data", "train_2x16.onnx", "train_4x64.onnx", "train_8x32.onnx")
    return Manifest(
        base="b" * 64,
        base_id="toy",
        task="next-token",
        layers={
            "blocks.0.up": LayerSpec("linear", (6,), 10),
            "blocks.0.down": LayerSpec("linear", (10,), 6),
            "head": LayerSpec("linear", (6,), 30, is_output=True),
        },
        lora=fl.LoraConfig(rank=3, lora_alpha=16),
        graphs={
            "train_2x16.onnx": GraphInfo("train", 2, 16),
            "train_4x64.onnx": GraphInfo("train", 4, 64),
            "train_8x32.onnx": GraphInfo("train", 8, 32),
        },
        files={name: FileInfo("0" * 64, 1) for name in names},
        outputs=2000,
        web=True,
    )


def trained(seed: int = 0, **about: Any) -> fl.Adapter:
    """An adapter whose numbers are all different."""
    config = replace(manifest().lora, **about)
    start = initial_adapter(manifest().layers, config, seed, manifest().base)
    random = np.random.default_rng(seed)
    layers = {
        path: fl.LoraLayer(
            layer.A,
            random.normal(size=layer.B.shape).astype(np.float32),
            layer.scaling,
            kind="linear",
        )
        for path, layer in start.layers.items()
    }
    return fl.Adapter(layers, config, start.base)


def damaged() -> dict[str, tuple[bytes, str]]:
    """Files that are refused, and what the page says of each."""
    good = encode_packed(trained())
    other = fl.Adapter(trained().layers, trained().config, "c" * 64)
    renamed = {f"{path}x": layer for path, layer in trained().layers.items()}
    wide = fl.Adapter(
        {
            "blocks.0.up": fl.LoraLayer(
                np.ones((3, 7), np.float32), np.ones((10, 3), np.float32), 1.0, kind="linear"
            )
        },
        trained().config,
        None,
    )
    return {
        "empty": (b"", "expected a safetensors file"),
        "cut": (good[:-4], "breaks off"),
        "longer": (good + b"1234", "belong to no tensor"),
        "flipped": (good[:-1] + bytes([good[-1] ^ 1]), "its SHA-256"),
        "other base": (encode_packed(other), "expected an adapter of the base bbbbbbbbbbbb"),
        "int8": (encode_packed(trained(), "int8"), "convert"),
        "unknown layer": (
            encode_packed(fl.Adapter(renamed, trained().config, None)),
            "takes no factors for layer blocks.0.downx",
        ),
        "other shape": (encode_packed(wide), "expected float32 of shape [3,6], found [3,7]"),
        "no adapter": (b"\x02\0\0\0\0\0\0\0{}", "that fedlora packed"),
    }


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """All messages of twelve people, and odd ones."""
    people = read_messages("chitchat_12x400.jsonl.gz")
    return [*(one for person in people.values() for one in person), *ODD]


@pytest.fixture(scope="module")
def logits() -> npt.NDArray[np.float32]:
    return np.random.default_rng(5).normal(size=(6, 11)).astype(np.float32).round(1)  # with ties


ROW = {"targets": [3, 0, 10, 5, 5, 2], "starts": [True, False, True, True, False, True]}


@pytest.fixture(scope="module")
def page(
    messages: list[str], logits: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the page's modules make of all cases."""
    if NODE is None:
        pytest.skip("node is not installed")
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.lstrip("v").partition(".")[0]) < 20:
        pytest.skip("node is older than 20, which has no crypto of the browser's kind")
    folder = tmp_path_factory.mktemp("twins")
    write_manifest(manifest(), folder)
    about = json.loads((folder / "manifest.json").read_bytes())
    tokenizer = json.loads(TOKENIZER.read_bytes())
    random = np.random.default_rng(1)
    cases = {
        "rows": {"tokenizer": tokenizer, "messages": messages, "longest": LONGEST},
        "messages": {"text": "a\n\n  b \r\n\x1c\u0085c\u3000\n\ufeffd\n \u200a \ne f"},
        "batches": [
            {"count": count, "steps": steps, "batchSize": size, "seed": seed}
            for count, steps, size, seed in BATCHES
        ],
        "divided": [[n, share] for n in (10, 11, 200, 250, 393) for share in SHARES],
        "initial": {"manifest": about, "seed": 3},
        "again": {
            "file": text(encode_packed(trained())), "manifest": about,
            "provenance": {"a": ["ä", 1]},
        },
        "refused": [{"file": text(file), "manifest": about} for file, _ in damaged().values()],
        "adamw": {
            "row": text(random.normal(size=500).astype(np.float32)),
            "gradients": [text(one) for one in gradients()],
            "rate": 2e-3,
            "decay": 0.01,
        },
        "pieces": {"manifest": about, "batches": LENGTHS},
        "words": {"tokenizer": tokenizer, "vocabulary": 2048, "allowed": ALLOWED},
        "split": TYPED,
        "sums": {"logits": text(logits), "vocabulary": logits.shape[1], "row": ROW},
        "floats": FLOATS,
    }  # fmt: skip
    order = folder / "order.json"
    modules = str(ROOT / "clients" / "web" / "js")
    order.write_text(json.dumps({"modules": modules, "cases": cases}), encoding="utf-8")
    command = [NODE, str(Path(__file__).with_name("twins.mjs")), str(order)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def gradients() -> list[npt.NDArray[np.float32]]:
    random = np.random.default_rng(2)
    made = [random.normal(size=500).astype(np.float32) for _ in range(GRADIENTS)]
    for one in made:
        one[:5] = 0  # never a gradient: 0 is divided by eps
    return made


def test_tokens_targets_and_word_starts_are_python_s(
    page: dict[str, Any], messages: list[str]
) -> None:
    expected = encode_messages(messages, load_tokenizer(TOKENIZER), LONGEST)
    assert expected.word_starts is not None
    assert len(page["rows"]) == len(messages) > 4000
    for index, row in enumerate(page["rows"]):
        size = int(expected.lengths[index])
        assert row["inputs"] == expected.inputs[index, :size].tolist(), messages[index]
        assert row["targets"] == expected.targets[index, :size].tolist()
        assert row["starts"] == expected.word_starts[index, :size].tolist()


def test_messages_are_lines_stripped_as_python_strips_them(page: dict[str, Any]) -> None:
    assert page["messages"] == ["a", "b", "c", "\ufeffd", "e f"]


def test_batches_are_those_that_python_draws(page: dict[str, Any]) -> None:
    for (count, steps, size, seed), found in zip(BATCHES, page["batches"], strict=True):
        config = TrainConfig(local_steps=steps, batch_size=size)
        examples = Examples(np.arange(float(count))[:, None], np.arange(count))
        drawn = draw_batches(examples, config, seed, "owner", "personal")
        assert found == [batch["targets"].tolist() for batch in drawn]


def test_as_many_messages_are_held_out_as_in_python(page: dict[str, Any]) -> None:
    expected = [
        int(round((1 - share) * n, 6)) for n in (10, 11, 200, 250, 393)
        for share in SHARES
    ]  # fmt: skip
    assert page["divided"] == expected


def test_a_new_adapter_is_the_same_bytes(page: dict[str, Any]) -> None:
    about = manifest()
    start = initial_adapter(about.layers, about.lora, 3, about.base)
    assert set(start.layers) == {"blocks.0.up", "blocks.0.down"}  # all-linear leaves the output out
    assert base64.b64decode(page["initial"]) == encode_packed(start)


def test_a_file_that_was_read_is_written_with_the_same_bytes(page: dict[str, Any]) -> None:
    expected = encode_packed(trained(), provenance={"a": ["ä", 1]})
    assert base64.b64decode(page["again"]) == expected


def test_what_does_not_fit_or_is_damaged_is_refused(page: dict[str, Any]) -> None:
    for (name, (_, expected)), found in zip(damaged().items(), page["refused"], strict=True):
        assert expected in found, name


def test_adamw_s_steps_are_numpy_s_to_the_bit(page: dict[str, Any]) -> None:
    row = np.random.default_rng(1).normal(size=500).astype(np.float32)
    optimizer = AdamW(500, 2e-3, 0.01)
    for gradient in gradients():
        optimizer.step(row, gradient)
    found = np.frombuffer(base64.b64decode(page["adamw"]), np.float32)
    np.testing.assert_array_equal(found, row)


def test_batches_are_cut_for_the_train_graphs_as_in_python(page: dict[str, Any]) -> None:
    for lengths, found in zip(LENGTHS, page["pieces"], strict=True):
        width = max(lengths)
        ids = np.zeros((len(lengths), width), np.int64)
        targets = np.full_like(ids, -100)
        for index, length in enumerate(lengths):
            ids[index, :length] = 1 + index * 100 + np.arange(length)
            targets[index, :length] = ids[index, :length]
        expected = pieces_of({"inputs": ids, "targets": targets}, manifest())
        assert [piece["graph"] for piece in found] == [piece.graph for piece in expected]
        for piece, twin in zip(found, expected, strict=True):
            assert piece["weight"] == twin.weight
            assert piece["inputs"] == twin.inputs.ravel().tolist()
            assert piece["targets"] == twin.targets.ravel().tolist()


def test_what_tokens_can_be_in_a_word_is_python_s(page: dict[str, Any]) -> None:
    words, found = Words.of(load_tokenizer(TOKENIZER), 2048), page["words"]
    assert found["begins"] == np.flatnonzero(words.begins).tolist()
    assert found["continues"] == np.flatnonzero(words.continues).tolist()
    assert found["ends"] == np.flatnonzero(words.ends).tolist()
    assert found["first"] == words.first.decode()
    for (spelt, need), ids in zip(ALLOWED, found["allowed"], strict=True):
        expected = words.allowed(spelt.encode("latin-1"), need.encode("latin-1"))
        assert sorted(ids) == sorted(expected.tolist()), need


def test_typed_text_is_taken_apart_as_in_python(page: dict[str, Any]) -> None:
    expected = [split_text(typed) for typed in TYPED]
    assert [(before, need.encode("latin-1")) for before, need in page["split"]] == expected


def test_sums_at_word_starts_are_python_s(
    page: dict[str, Any], logits: npt.NDArray[np.float32]
) -> None:
    expected = next_token_sums(logits[None], np.array([ROW["targets"]]), np.array([ROW["starts"]]))
    found = page["sums"]
    for name in ("tokens", "top1", "top3"):
        assert found[name] == expected[name]
    assert found["wordStarts"] == expected["word_starts"]
    # Python takes exponentials in float32, the page in double precision.
    assert found["nats"] == pytest.approx(expected["nats"], rel=1e-6)


def test_floats_are_written_as_python_writes_them(page: dict[str, Any]) -> None:
    assert page["floats"] == [repr(value) for value in FLOATS]
