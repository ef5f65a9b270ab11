"""A person's messages in headless Chromium: the page learns as Python does, and says it to nobody.

Needs Node, Chromium and the npm package playwright-core: the folder that FEDLORA_PLAYWRIGHT names,
or what npm installs into a temporary one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.data import draw_batches, load_data
from fedlora.data.chitchat import read_messages
from fedlora.data.text import encode_messages
from fedlora.device.scoring import evaluate
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.export import export_bundle
from fedlora.formats import load_adapter, read_info
from fedlora.training import TrainConfig
from fedlora.web import Bundle, make_site, server

USER, TYPED, PROBE = "0aa3d49a", 200, "I think "
CONFIG = TrainConfig(local_steps=48, batch_size=8, learning_rate=2e-3)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where Node, Chromium and playwright-core are."""
    node = shutil.which("node")
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if node is None or browser is None:
        pytest.skip("node or chromium is not installed")
    package = os.environ.get("FEDLORA_PLAYWRIGHT")
    if package is None:
        folder, npm = tmp_path_factory.mktemp("node"), shutil.which("npm")
        command = [npm or "npm", "install", "--prefix", str(folder), "playwright-core@1"]
        if npm is None or subprocess.run(command, capture_output=True, timeout=300).returncode:
            pytest.skip("playwright-core cannot be installed; name its folder: FEDLORA_PLAYWRIGHT")
        package = str(folder / "node_modules" / "playwright-core")
    return {"node": node, "browser": browser, "playwright": package}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "web"
    export_bundle("tiny-chat", folder, web=True, decode=True)
    return folder


def clicked(
    script: str, tools: dict[str, str], bundle: Path, order: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[tuple[float, str]]]:
    """Run the clicks; return what the page showed, and (time, path) the server was asked for."""
    asked: list[tuple[float, str]] = []
    found = server(
        make_site([Bundle(bundle)]), port=0, seen=lambda path: asked.append((time.time(), path))
    )
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    file = folder / "order.json"
    order = {**order, **tools, "url": f"http://127.0.0.1:{found.server_address[1]}/"}
    file.write_text(json.dumps(order), encoding="utf-8")
    command = [tools["node"], str(Path(__file__).with_name(script)), str(file)]
    running = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    try:
        first = running.stdout.readline()
    finally:
        found.shutdown()
        thread.join()
        found.server_close()
    out, errors = running.communicate("\n", timeout=600)
    assert first == "STOP\n", errors
    assert running.returncode == 0, errors
    seen: dict[str, Any] = json.loads(out)
    return seen, asked


@pytest.mark.slow
def test_two_hundred_typed_messages_teach_the_page_what_they_teach_python(
    tools: dict[str, str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [one.strip() for one in read_messages("chitchat_117x1000.jsonl.gz")[USER]]
    messages = [one for one in messages if one and "\n" not in one][: 2 * TYPED]
    exported = tmp_path / "my-adapter.safetensors"
    order = {
        "typed": messages[:TYPED], "pasted": messages[TYPED:], "probe": PROBE,
        "steps": CONFIG.local_steps, "heldOut": 50, "exported": str(exported),
    }  # fmt: skip
    seen, asked = clicked("drive_keyboard.mjs", tools, bundle, order, tmp_path)

    session = Session(bundle, threads=1)
    tokenizer = session.bundle.tokenizer()
    train, held_out = (
        encode_messages(part, tokenizer, 64) for part in (messages[:TYPED], messages[TYPED:])
    )
    losses: list[float] = []
    result = Trainer(session.bundle).fit(
        draw_batches(train, CONFIG, 0, "owner", "personal"),
        CONFIG,
        progress=lambda step, loss: losses.append(loss),
    )
    measures, words = {"base": evaluate(session, held_out)}, {}
    words["base"] = [one.word for one in session.suggest(PROBE, 3)]
    session.swap(result.adapter)
    measures["yours"] = evaluate(session, held_out)
    words["yours"] = [one.word for one in session.suggest(PROBE, 3)]
    gains = {
        "page": seen["measures"]["yours"]["top3"] - seen["measures"]["base"]["top3"],
        "python": measures["yours"]["top3"] - measures["base"]["top3"],
    }
    worst = max(abs(a - b) for a, b in zip(seen["losses"], losses, strict=True))
    with capsys.disabled():
        print(f"\nlosses differ by {worst:.1e}; top-3 gain {gains}; page {seen['measures']}")
        print(f"python {measures}; words {seen['before']} -> {seen['after']}")

    assert seen["count"] == f"{2 * TYPED} messages"
    assert worst <= 1e-3  # what is asked for; float32 sums in another order give 1e-5
    assert abs(gains["page"] - gains["python"]) <= 0.01  # a point
    assert gains["page"] > 0.005
    for which, values in measures.items():
        assert abs(seen["measures"][which]["loss"] - values["loss"]) <= 1e-3
    assert (seen["before"], seen["after"]) == (words["base"], words["yours"])
    assert seen["after"] != seen["before"]
    assert seen["imported"] == seen["after"]

    # What it exported is what Python trained, and fedlora reads it. Whole layers are compared: Adam
    # divides a gradient by its own size, so where one is almost zero, rounding decides its step.
    found = load_adapter(exported)
    assert read_info(exported).provenance == {"made_by": "fedlora web"}
    apart = max(
        float(np.linalg.norm(found.layers[path].delta_weight - layer.delta_weight))
        / float(np.linalg.norm(layer.delta_weight))
        for path, layer in result.adapter.layers.items()
    )
    with capsys.disabled():
        print(f"layers differ by {apart:.1e} of their norm")
    assert apart <= 5e-3  # 5e-4 was found; the losses of both are compared below
    session.swap(found)
    assert abs(evaluate(session, held_out)["loss"] - seen["measures"]["yours"]["loss"]) <= 1e-4

    # Nothing left the page: neither seen by the browser, nor by the server, nor possible.
    assert seen["late"] == []
    assert seen["refused"] == {"fetch": True, "image": True, "socket": True}
    inside = [path for at, path in asked if seen["loadedAt"] / 1000 < at < seen["leftAt"] / 1000]
    assert inside == []
    assert len(asked) > 30

    assert seen["forgotten"] == 0
    assert seen["offline"].startswith("Ready: tiny-chat")
    assert seen["unfit"] == (
        "the adapter kept here: expected a safetensors file, found 3 bytes. Forget it, or train "
        "another in its place."
    )
    assert seen["trainable"]
    assert seen["errors"] == []


@pytest.mark.slow
def test_the_watch_learns_a_person_s_movements_as_python_does(
    tools: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, config = tmp_path / "bundle", TrainConfig(local_steps=40, learning_rate=2e-3)
    lora = fl.LoraConfig(target_modules=("conv1", "conv2", "conv3", "hidden", "classifier"))
    export_bundle("watch-cnn", bundle, web=True, lora=lora, train=("16",))
    seen, _ = clicked("drive_watch.mjs", tools, bundle, {"steps": 40}, tmp_path)

    person = load_data("watch").client("1_left")
    session, losses = Session(bundle, threads=1), []
    result = Trainer(session.bundle).fit(
        draw_batches(person.train, config, 0, "owner", "personal"),
        config,
        progress=lambda step, loss: losses.append(loss),
    )
    base = evaluate(session, person.test)
    session.swap(result.adapter)
    measures = {"base": base, "yours": evaluate(session, person.test)}
    worst = max(abs(a - b) for a, b in zip(seen["losses"], losses, strict=True))
    with capsys.disabled():
        print(f"\nlosses differ by {worst:.1e}; page {seen['measures']}; python {measures}")
    assert "1_left" in seen["person"]
    assert worst <= 1e-3
    assert measures["yours"]["accuracy"] > base["accuracy"]
    windows = len(person.test)
    for which, values in measures.items():
        assert abs(seen["measures"][which]["accuracy"] - values["accuracy"]) <= 0.01  # a window
        assert abs(seen["measures"][which]["loss"] - values["loss"]) <= 2e-3
        right = round(seen["measures"][which]["accuracy"] * windows)
        assert f"{right} of {windows} windows" in seen["tally"][which]
    assert seen["errors"] == []
