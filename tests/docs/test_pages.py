"""Every block of a page that is not marked as shown is run, in order, in the page's own folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from tests.docs.blocks import PAGES, ROOT, Block, blocks

pytestmark = pytest.mark.slow

RUNNABLE = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks(page))]
EXAMPLES = ["compare_methods", "deploy", "own_csv", "own_model", "personalize"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages take as given: a bundle, a small run of the keyboard, messages."""
    folder = tmp_path_factory.mktemp("given")
    for command in (
        "fedlora export tiny-chat --train 8x32 --decode --out bundle",
        "fedlora simulate keyboard --set federation.rounds=1 --set data.id=chitchat-small --set "
        "data.clients=4 --set data.held_out_clients=0.25 --set federation.cohort=3 --set "
        "personalization.cross=0 --out runs/keyboard",
        "fedlora simulate watch --set federation.rounds=1 --out runs/watch",
        "mkdir runs/a runs/b && cp -r runs/watch/adapter runs/a && cp -r runs/watch/adapter runs/b",
        "cp runs/keyboard/adapter.safetensors global.safetensors",
        "for i in $(seq 60); do echo see you at the game number $i; done > messages.txt",
        "cp messages.txt my-messages.txt",
    ):
        shell(command, folder)
    return folder


def shell(text: str, folder: Path) -> None:
    """Run a block with this environment's commands on the path."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def with_a_small_file(names: dict[str, Any]) -> None:
    """What the page of file formats reads."""
    shell("fedlora convert global.safetensors small.safetensors --codec int8", Path.cwd())


def on_a_device(names: dict[str, Any]) -> None:
    """What the page of the device takes as given."""
    import fedlora as fl
    from fedlora.data import draw_batches, load_data

    people = load_data("chitchat-small", tokenizer="bundle", max_length=32)
    mine = people.client(people.client_ids[0])
    config = fl.TrainConfig(local_steps=2, batch_size=8)
    adapter = fl.load_adapter("global.safetensors")
    names |= {
        "adapter": adapter, "mine": adapter.scaled(0.5), "inputs": mine.test.inputs[:2],
        "batches": list(draw_batches(mine.train, config, 0, "me", "personal")),
    }  # fmt: skip


def in_torch(names: dict[str, Any]) -> None:
    """What the page of the engine takes as given: a model and batches for it."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    on_a_device(names)
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 2)})
    model.forward = lambda x: model["v_proj"](model["q_proj"](x))  # type: ignore[method-assign]
    names |= {"torch": torch, "F": F, "np": np}


PRELUDES: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/device.md": on_a_device,
    "docs/engine.md": in_torch,
    "docs/file-formats.md": with_a_small_file,
}


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_runs(
    page: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(f"cp -r {made}/. .", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "page"}
    if page in PRELUDES:
        PRELUDES[page](names)
    for block in blocks(page):
        run(block, names, tmp_path)


def run(block: Block, names: dict[str, Any], folder: Path) -> None:
    """Do what a block says, unless it is only shown."""
    if block.file is not None:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    elif block.shown is None and block.language == "bash":
        shell(block.text, folder)
    elif block.shown is None and block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is(name: str, made: Path, tmp_path: Path) -> None:
    path = ROOT / "simulations" / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    shell(f"cp -r {made}/bundle . && {sys.executable} {path}", tmp_path)


def test_the_packed_format_is_as_its_page_says(made: Path, tmp_path: Path) -> None:
    """The reader that the page shows, written without fedlora, agrees with fedlora."""
    import fedlora as fl

    adapter = fl.load_adapter(made / "global.safetensors")
    path = tmp_path / "small.safetensors"
    fl.save_adapter(adapter, path, codec="int8")
    names: dict[str, Any] = {}
    (block,) = (b for b in blocks("docs/file-formats.md") if b.language == "python")
    exec(block.text.rpartition("\n\n")[0], names)
    found, expected = names["read_packed"](str(path)), fl.load_adapter(path)
    assert found.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        # The same float32 factors; the product's order of summation may differ.
        np.testing.assert_allclose(found[name], layer.delta_weight, rtol=1e-5, atol=1e-7)
