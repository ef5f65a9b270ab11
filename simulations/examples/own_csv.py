"""Federate a classifier over your own CSV: a column says whose row it is, one what it shows.

    python simulations/examples/own_csv.py [CSV]

The file needs the columns `person` and `label` (whole numbers from 0); all others are features.
Without one, people.csv beside this file takes its place: six invented people.
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedlora.simulation import simulate

EXPERIMENT = """
name = "own-csv"
[base]
id = "own_csv:base"
[data]
id = "own_csv:people"
task = "classification"
[federation]
rounds = 5
cohort = 4
local_steps = 8
learning_rate = 0.01
"""


def base() -> nn.Module:
    """The frozen base that everyone has; yours would be trained on data that you may use."""
    torch.manual_seed(0)  # the same base for everyone, in every process
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))


def people() -> dict[str, dict[str, np.ndarray]]:
    """Read the file: for each person the features, (n, 4), and the labels, (n,)."""
    with open(os.environ["OWN_CSV"], newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted({row["person"] for row in rows}):
        own = [row for row in rows if row["person"] == name]
        features = [[float(row[k]) for k in row if k not in ("person", "label")] for row in own]
        labels = [int(row["label"]) for row in own]
        found[name] = {"inputs": np.array(features, np.float32), "targets": np.array(labels)}
    return found


if __name__ == "__main__":
    os.environ["OWN_CSV"] = (
        sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("people.csv"))
    )
    Path("own-csv.toml").write_text(EXPERIMENT)
    print(simulate("own-csv.toml").table())
