"""How a message ends, with the language model already applied: rounds that cost little.

The people, the messages and the five classes are those of "chitchat-punctuation", of each person
the first `MESSAGES`. tiny-chat has read each message once, and an example is the 256 numbers of its
last token: what is left is a small network, whose first layer was drawn and is frozen like a base,
and whose head is zero, so that everything it tells is what a federation has learned.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import ClientData, Examples
from fedlora.data.chitchat import ENDINGS, read_ending_client, read_messages
from fedlora.data.text import load_tokenizer
from fedlora.nn import load_base
from fedlora.simulation.threads import one_torch_thread

__all__ = ["MESSAGES", "EndingNet", "base", "data"]

MESSAGES = 200  # of each person
FEATURES, HIDDEN = 256, 64
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15  # the last ones, as everywhere
_BATCH = 64


class EndingNet(nn.Module):
    """(b, `FEATURES`) float32 to (b, 5) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, len(ENDINGS))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.relu(self.hidden(F.layer_norm(inputs, (FEATURES,)))))
        return out


def base() -> nn.Module:
    """Return the frozen network; the same on every call."""
    model = EndingNet()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.orthogonal_(model.hidden.weight)
        for zero in (model.hidden.bias, model.classifier.weight, model.classifier.bias):
            nn.init.zeros_(zero)
    return model.eval()


@cache
def data() -> dict[str, ClientData]:
    """Return the 117 people by name, each cut by time."""
    found = load_base("tiny-chat", num_classes=len(ENDINGS))
    model, tokenizer = found.model.eval(), load_tokenizer(found.tokenizer)
    seen: list[Tensor] = []
    head = model.zero_head
    assert isinstance(head, nn.Module)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def read(part: Examples) -> Examples:
        seen.clear()
        with torch.no_grad(), one_torch_thread():
            for start in range(0, len(part), _BATCH):
                model(torch.from_numpy(part.inputs[start : start + _BATCH].copy()))
        return Examples(torch.cat(seen).numpy(), part.targets)

    people = {}
    for name, messages in sorted(read_messages("chitchat_117x1000.jsonl.gz").items()):
        client = read_ending_client(
            name, messages[:MESSAGES], tokenizer,
            test_share=TEST_SHARE, validation_share=VALIDATION_SHARE, max_length=32,
        )  # fmt: skip
        parts = (read(part) for part in (client.train, client.validation, client.test))
        people[name] = ClientData(name, *parts)
    return people
