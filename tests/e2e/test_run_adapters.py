"""A run's adapter in real PEFT (the oracle): the same outputs on the people's own data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.bases import list_bases
from fedlora.data import load_data
from fedlora.formats import load_adapter
from fedlora.nn import inject_lora, load_adapter_into, load_base
from fedlora.simulation import simulate

peft = pytest.importorskip("peft")

WATCH = {
    "data.clients": 4,
    "federation.rounds": 3,
    "federation.cohort": 2,
    "federation.local_steps": 2,
    "personalization.steps": 1,
}
KEYBOARD = {
    "data.clients": 2,
    "data.held_out_clients": 0.0,
    "federation.rounds": 1,
    "federation.cohort": 2,
    "federation.local_steps": 2,
    "personalization.steps": 1,
    "personalization.cross": 0,
}
READY = {info.id for info in list_bases() if info.ready}
# Float32 sums in another order: PEFT adds the same product to the same layer's output.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("experiment", "overrides", "base"),
    [
        ("watch", WATCH, "watch-cnn"),
        ("keyboard", KEYBOARD, "tiny-chat"),
        pytest.param(
            "keyboard-smollm2", KEYBOARD, "smollm2-135m",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    "smollm2-135m" not in READY,
                    reason="needs the base: fedlora models fetch smollm2-135m",
                ),
            ],
        ),
    ],
)  # fmt: skip
def test_peft_gives_the_outputs_of_the_run(experiment, overrides, base, tmp_path):
    run = simulate(experiment, overrides=overrides, out=tmp_path / "run")
    folder = run.folder / "adapter"
    inputs = _inputs(experiment, base)
    before = _outputs(load_base(base).model, inputs)

    ours = load_base(base).model
    adapter = load_adapter(folder)
    inject_lora(ours, adapter.config, seed=1)
    load_adapter_into(ours, adapter)
    expected = _outputs(ours, inputs)

    theirs = peft.PeftModel.from_pretrained(load_base(base).model, folder)
    np.testing.assert_allclose(_outputs(theirs, inputs), expected, rtol=0, atol=TOLERANCE)
    # An adapter that did nothing would pass the line above.
    assert np.abs(expected - before).max() > 1000 * TOLERANCE


def _inputs(experiment: str, base: str) -> torch.Tensor:
    """Eight test examples of one person who is in the data of the experiment."""
    data = load_data(
        "watch" if experiment == "watch" else "chitchat", tokenizer=load_base(base).tokenizer
    )
    examples = data.client(data.client_ids[0]).test
    return torch.tensor(examples.inputs[:8])


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: torch.Tensor) -> np.ndarray:
    out = model.eval()(inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()
