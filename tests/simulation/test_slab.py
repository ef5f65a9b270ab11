"""What virtual clients keep: rows by round, the same after a crash, refused when another run's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import ServerState, method, methods
from fedlora.errors import RunError, ShapeMismatchError
from fedlora.flat import Segment, segments_of
from fedlora.simulation.slab import PersonalSlab, open_slab, starts_of

SEGMENTS = (Segment("fc", "B", (2, 3)),)


def row(value: float) -> np.ndarray:
    return np.full(6, value, np.float32)


def test_a_row_is_read_from_the_round_after_it_was_written(tmp_path: Path) -> None:
    slab = PersonalSlab(tmp_path / "p", 3, SEGMENTS)
    assert slab.read(1, 1) is None
    slab.write(1, 1, row(1))
    assert slab.read(1, 1) is None  # a round does not see itself
    np.testing.assert_array_equal(slab.read(1, 2), row(1))
    slab.write(1, 4, row(4))
    np.testing.assert_array_equal(slab.read(1, 5), row(4))
    np.testing.assert_array_equal(slab.read(1, 4), row(1))
    assert slab.read(0, 9) is None


def test_a_round_that_runs_twice_reads_the_same_and_replaces_its_own(tmp_path: Path) -> None:
    slab = PersonalSlab(tmp_path / "p", 1, SEGMENTS)
    for round in (1, 2, 3):
        slab.write(0, round, row(round))
    slab.write(0, 3, row(30))
    np.testing.assert_array_equal(slab.read(0, 3), row(2))
    np.testing.assert_array_equal(slab.read(0, 4), row(30))


def test_rows_are_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    slab = PersonalSlab(tmp_path / "p", 2, SEGMENTS)
    slab.write(1, 7, row(7))
    slab.flush()
    np.testing.assert_array_equal(PersonalSlab(tmp_path / "p", 2, SEGMENTS).read(1, 8), row(7))


def test_unused_rows_take_no_space(tmp_path: Path) -> None:
    wide = (Segment("fc", "B", (1000, 100)),)
    slab = PersonalSlab(tmp_path / "p", 1000, wide)
    slab.write(999, 1, np.ones(100_000, np.float32))
    slab.flush()
    file = (tmp_path / "p" / "rows.float32").stat()
    assert file.st_size == 1000 * 2 * 400_000
    assert file.st_blocks * 512 < 2_000_000


@pytest.mark.parametrize(
    ("clients", "segments"), [(3, SEGMENTS), (2, (Segment("fc", "A", (2, 3)),))]
)
def test_another_runs_rows_are_refused(
    tmp_path: Path, clients: int, segments: tuple[Segment, ...]
) -> None:
    PersonalSlab(tmp_path / "p", 2, SEGMENTS)
    with pytest.raises(RunError, match="they are another run's: choose another folder"):
        PersonalSlab(tmp_path / "p", clients, segments)


def test_a_row_of_another_size_is_refused(tmp_path: Path) -> None:
    slab = PersonalSlab(tmp_path / "p", 2, SEGMENTS)
    with pytest.raises(ShapeMismatchError, match=r"expected \(6,\), found \(5,\)"):
        slab.write(0, 1, row(1)[:5])


def test_a_client_goes_on_from_its_own_factors_and_others_from_the_servers(tmp_path: Path) -> None:
    layer = LoraLayer(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32), 1.0)
    state = ServerState(3, Adapter({"fc": layer}, LoraConfig(rank=2)))
    kept = method("fedsa-lora").kept(3)
    assert kept == {"B"}
    assert not any(m.kept(1) for name, m in methods().items() if name != "fedsa-lora")
    slab = open_slab(tmp_path, 2, segments_of(state.trainable, kept))
    slab.write(1, 3, np.arange(8, dtype=np.float32))
    start_of = starts_of(tmp_path, ["ann", "bob"], state, kept)
    assert start_of("ann") is state.trainable  # it never took part
    mine = start_of("bob")
    assert np.array_equal(mine["fc"].B, np.arange(8, dtype=np.float32).reshape(4, 2))
    assert np.array_equal(mine["fc"].A, layer.A)
