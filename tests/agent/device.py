"""A hand-made classifier on a device, with a repository, owner's data, and adapters of known worth.

The owner's labels are what one random adapter, the `teacher`, makes the model say. So the teacher
is the best adapter there is here, a part of it is better than the base, and its negative is worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fedlora as fl
from fedlora.agent import Agent, Limits
from fedlora.data import Examples
from fedlora.device.canaries import Canaries, write_canaries
from fedlora.device.owner_data import OwnerData
from fedlora.training import TrainConfig
from tests.device.hand_made import (
    FEATURES,
    HandMade,
    classifier_logits,
    rewrite_manifest,
    write_classifier,
)
from tests.ota.web import Web
from tests.ota.world import World, make_world

TRAINING = TrainConfig(local_steps=40, learning_rate=0.02, batch_size=16)
# The clock is not what most tests are about, and the machine may be busy.
PATIENT = Limits(slower=1e6)


@dataclass
class Fleet:
    """One device and what it is updated from."""

    world: World
    web: Web
    made: HandMade
    data: OwnerData

    def adapter(self, share: float, seed: int = 5) -> fl.Adapter:
        """Return so much of the teacher."""
        return self.made.adapter(seed=seed).scaled(share)

    def publish(self, share: float, **about: Any) -> int:
        """Publish so much of the teacher; return the version."""
        path = self.world.folder / "next.safetensors"
        fl.save_adapter(self.adapter(share), path)
        return self.world.publisher.publish(path, **about).version

    def agent(self, **about: Any) -> Agent:
        """Return an agent with the owner's data, as a process that has just started."""
        given = {"data": lambda bundle: self.data, "training": TRAINING, "limits": PATIENT, **about}
        return Agent(self.world.updater(self.web), **given)


def make_fleet(folder: Path, web: type[Web] = Web) -> Fleet:
    """Make it; close `fleet.web` afterwards."""
    made = write_classifier(folder / "bundle")
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=(200, FEATURES)).astype(np.float32)
    probe = inputs[:4]
    write_canaries(folder / "bundle", Canaries(probe, classifier_logits(made.weights, probe)))
    made = HandMade(made.folder, rewrite_manifest(made.folder, made.manifest), made.weights)
    teacher = made.adapter(seed=5)
    targets = classifier_logits(made.weights, inputs, teacher).argmax(1).astype(np.int64)
    data = OwnerData(Examples(inputs[:120], targets[:120]), Examples(inputs[120:], targets[120:]))
    world = make_world(folder / "world", bundle=made.folder)
    return Fleet(world, web(world.repository), made, data)
