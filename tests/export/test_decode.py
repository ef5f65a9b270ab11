"""A decode graph, fed token by token, says what the whole row says."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from fedlora.errors import UnsupportedError
from fedlora.export.decode import decode_graph
from fedlora.export.trace import subject_of
from fedlora.export.traced import Traced
from tests.export.models import CASES, random_adapter, run
from tests.export.test_trace import LOGITS, injected_logits
from tests.nn.models import TiedLm, seeded

WRITERS = ("tiny-chat", "gpt2", "hf-llama")


@cache
def decoder(name: str) -> Traced:
    return decode_graph(CASES[name].subject())


def empty(traced: Traced, rows: int) -> dict[str, torch.Tensor]:
    return {
        name: traced.examples[name][:1, :, :0].expand(rows, -1, -1, -1)
        for name in traced.inputs
        if name.startswith("past_key_values")
    }


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("parts", [(7,), (1, 1, 1, 4), (3, 4)])
def test_parts_of_a_row_give_the_logits_of_the_whole(name: str, parts: tuple[int, ...]) -> None:
    case, subject, graph = CASES[name], CASES[name].subject(), decoder(name)
    adapter = random_adapter(subject, 4, seed=2)
    for rows, given in ((2, adapter), (1, None)):
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(1, case.vocabulary, (rows, sum(parts)), generator=generator)
        whole = injected_logits(subject.model, given, case, ids)
        past, done = empty(graph, rows), 0
        for part in parts:
            found = run(
                graph,
                {"inputs": ids[:, done : done + part], **past},
                [] if given is None else [(given, False)],
            )
            done += part
            torch.testing.assert_close(found["logits"], whole[:, done - 1], **LOGITS)
            past = {
                key.replace("present", "past_key_values"): value
                for key, value in found.items()
                if key != "logits"
            }
            assert all(value.shape[2] == done for value in past.values())


@pytest.mark.parametrize("name", WRITERS)
def test_a_decode_graph_has_the_ends_that_the_manifest_describes(name: str) -> None:
    graph, layers = decoder(name), {"tiny-chat": 3, "gpt2": 2, "hf-llama": 1}[name]
    ends = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    paths = CASES[name].subject().layers
    factors = [f"{p}.lora_{f}.weight" for p in paths for f in "AB"]
    assert graph.inputs == ("inputs", *(f"past_key_values.{end}" for end in ends), *factors)
    assert graph.outputs == ("logits", *(f"present.{end}" for end in ends))
    assert graph.axes["past_key_values.0.key"] == {0: "batch", 2: "past"}


def test_a_step_of_our_llama_is_its_forward() -> None:
    model = CASES["tiny-chat"].subject().model
    ids = torch.tensor([[5, 9, 8, 7], [3, 4, 5, 6]])
    config = model.config
    nothing = torch.zeros((2, config.num_key_value_heads, 0, config.head_size))
    past = [(nothing, nothing)] * config.num_hidden_layers
    with torch.no_grad():
        whole = model(ids)
        for i in range(4):
            logits, past = model.step(ids[:, i : i + 1], past)
            torch.testing.assert_close(logits, whole[:, i], **LOGITS)


@pytest.mark.parametrize("case", ["classification", "no cache"])
def test_what_cannot_write_is_refused(case: str) -> None:
    model: nn.Module
    if case == "classification":
        subject, text = CASES["mlp"].subject(), "expected a language model"
    else:
        model = seeded(TiedLm)
        subject, text = subject_of(model, ["mix"], "next-token"), "TiedLm takes no cache"
    with pytest.raises(UnsupportedError, match=text):
        decode_graph(subject)
