"""Canaries: what a bundle's base is known to compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.device.canaries import (
    Canaries,
    drift,
    probe_of,
    read_canaries,
    tolerance,
    write_canaries,
)
from fedlora.device.manifest import read_manifest
from fedlora.device.session import Session
from fedlora.errors import DigestMismatchError, FormatError
from tests.device.hand_made import (
    FEATURES,
    classifier_logits,
    language_logits,
    rewrite_manifest,
    write_classifier,
    write_language_model,
)

INPUTS = np.linspace(-1, 1, 2 * FEATURES, dtype=np.float32).reshape(2, FEATURES)


def test_a_sound_device_sings_as_the_exporter_did(tmp_path: Path) -> None:
    made = write_classifier(tmp_path)
    write_canaries(tmp_path, Canaries(INPUTS, classifier_logits(made.weights, INPUTS)))
    manifest = rewrite_manifest(tmp_path, made.manifest)
    canaries = read_canaries(tmp_path, read_manifest(tmp_path))
    assert canaries is not None
    np.testing.assert_array_equal(canaries.inputs, INPUTS)
    session = Session(tmp_path)
    assert drift(session, canaries) < 1e-6  # float32 beside float64, logits of about 1
    np.testing.assert_array_equal(probe_of(canaries, manifest), INPUTS)
    session.swap(made.adapter())
    assert drift(session, canaries) > tolerance(manifest)


def test_of_a_language_model_the_last_position_counts(tmp_path: Path) -> None:
    made = write_language_model(tmp_path)
    ids = np.array([[3, 5, 7], [2, 2, 9]])
    write_canaries(tmp_path, Canaries(ids, language_logits(made.weights, ids)[:, -1]))
    manifest = rewrite_manifest(tmp_path, made.manifest)
    canaries = read_canaries(tmp_path, manifest)
    assert canaries is not None
    assert canaries.inputs.dtype == np.int64
    # Sums of 16 products in float32, relative to the largest logit, 16.
    assert drift(Session(tmp_path), canaries) < 1e-5
    assert drift(Session(tmp_path), replace(canaries, logits=canaries.logits + 1)) > 0.01


def test_without_canaries_there_is_still_a_probe(tmp_path: Path) -> None:
    made = write_classifier(tmp_path / "c")
    assert read_canaries(tmp_path / "c", made.manifest) is None
    assert probe_of(None, made.manifest).shape == (8, FEATURES)
    text = write_language_model(tmp_path / "t").manifest
    assert probe_of(None, text).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("shape", [(2, FEATURES + 1), (0, FEATURES), (2,)])
def test_canaries_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = write_classifier(tmp_path)
    write_canaries(tmp_path, Canaries(np.zeros(shape), np.zeros((shape[0], 3), np.float32)))
    manifest = rewrite_manifest(tmp_path, made.manifest)
    with pytest.raises(FormatError):
        read_canaries(tmp_path, manifest)


def test_changed_canaries_are_refused(tmp_path: Path) -> None:
    made = write_classifier(tmp_path)
    write_canaries(tmp_path, Canaries(INPUTS, np.zeros((2, 3), np.float32)))
    manifest = rewrite_manifest(tmp_path, made.manifest)
    write_canaries(tmp_path, Canaries(INPUTS, np.ones((2, 3), np.float32)))
    with pytest.raises(DigestMismatchError, match="damaged"):
        read_canaries(tmp_path, manifest)
