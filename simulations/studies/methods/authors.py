"""Whose message is it? Twenty users of a chat, as features that a small network reads at once.

The twenty people are those of the data set "chitchat-authors". An example is here not a row of
tokens but `FEATURES` numbers: the hashed runs of one to three characters, the usual features of
authorship, in `TOGETHER` messages that one person wrote one after another. A run of hundreds of
client steps then takes a second, where the language model takes a minute, so that a study of
thousands of runs can be had.

Each person's examples are cut by time into the parts of a client. The base was trained to tell the
next twenty people apart: its layers know what makes an author, and its classes are other people's,
so that it is right by chance alone and a federation has to make its classes anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import ClientData, Examples
from fedlora.data.chitchat import read_messages
from fedlora.simulation.threads import one_torch_thread

__all__ = ["AUTHORS", "AuthorNet", "base", "data", "features"]

AUTHORS = 20
FEATURES = 512
HIDDEN = 64
TOGETHER = 4  # messages an example
TRAIN, VALIDATION, TEST = 150, 30, 50  # examples of each author, in this order
_USED = TRAIN + VALIDATION + TEST
_STEPS, _BATCH, _RATE = 400, 256, 3e-3  # of the base's training


class AuthorNet(nn.Module):
    """(b, `FEATURES`) float32 to (b, `AUTHORS`) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, AUTHORS)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.relu(self.second(F.relu(self.first(inputs)))))
        return out


def base() -> nn.Module:
    """Return the frozen network, trained to tell twenty others apart."""
    model = AuthorNet()
    model.load_state_dict(_trained())
    return model.eval()


def data() -> dict[str, ClientData]:
    """Return the authors by name; all examples of one have one class. To be dealt out anew."""
    found = {}
    for label, (author, rows) in enumerate(_rows_of(0).items()):
        parts = np.split(rows, np.cumsum([TRAIN, VALIDATION]))
        examples = [Examples(part, np.full(len(part), label, np.int64)) for part in parts]
        found[author] = ClientData(author, *examples)
    return found


def features(messages: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return ``(FEATURES,)`` numbers: 1 + log of the counts, of Euclidean length 1.

    >>> features(["a"]).nonzero()[0].size  # of line end, a, line end: 2 runs of one, 2 of two, 1
    5
    """
    # The line ends say which characters a message begins and ends with.
    text = "\n".join(["", *messages, ""])
    runs = (text[at : at + size] for size in (1, 2, 3) for at in range(len(text) - size + 1))
    row = np.zeros(FEATURES, np.float32)
    for place, count in Counter(crc32(run.encode()) % FEATURES for run in runs).items():
        row[place] = 1 + math.log(count)
    return np.asarray(row / np.linalg.norm(row), np.float32)


@cache
def _rows_of(place: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return the examples of twenty users, oldest first, by name.

    Users are ranked by how many messages they have, and `place` is of the first one.
    """
    messages = read_messages("chitchat_117x1000.jsonl.gz")
    ranked = sorted(messages, key=lambda user: (-len(messages[user]), user))
    return {user: _rows(messages[user]) for user in sorted(ranked[place : place + AUTHORS])}


def _rows(messages: Sequence[str]) -> npt.NDArray[np.float32]:
    places = range(0, TOGETHER * _USED, TOGETHER)
    return np.stack([features(messages[at : at + TOGETHER]) for at in places])


@cache
def _trained() -> dict[str, Tensor]:
    """Return the base's weights; the same on every call, and in every process of one machine."""
    others = _rows_of(AUTHORS).values()
    inputs = torch.from_numpy(np.concatenate([*others]))
    targets = torch.arange(AUTHORS).repeat_interleave(_USED)
    with one_torch_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = AuthorNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        for _ in range(_STEPS):
            rows = torch.randint(len(inputs), (_BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
