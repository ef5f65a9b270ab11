"""Adapters: what they refuse, and their algebra against dense matrices."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, LoraConfig, LoraLayer, common_base, stack
from fedlora.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from tests.formats.adapters import small_adapter
from tests.matching import raises

SIZES = st.integers(1, 7)
SHAPES = st.one_of(
    SIZES.map(lambda n: ("linear", (n,))),
    st.tuples(SIZES, st.integers(1, 3)).map(lambda shape: ("conv", shape)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)).map(
        lambda shape: ("conv", shape)
    ),
    SIZES.map(lambda n: ("embedding", (n,))),
)


def layer(rank=2, in_shape=(3,), out=4, kind="linear", scaling=0.5, seed=0, dora=False):
    rng = np.random.default_rng(seed)
    return LoraLayer(
        A=rng.normal(size=(rank, *in_shape)),
        B=rng.normal(size=(out, rank)),
        scaling=scaling,
        magnitude=rng.uniform(1, 2, out) if dora else None,
        kind=kind,
    )


def dense(lora: LoraLayer) -> np.ndarray:
    """The slow twin of delta_weight: a loop over the rank, in float64."""
    total = np.zeros((lora.out_features, *lora.in_shape))
    for r in range(lora.rank):
        total += np.multiply.outer(lora.B[:, r].astype(float), lora.A[r].astype(float))
    return lora.scaling * total


@st.composite
def layers(draw, count=1):
    kind, in_shape = draw(SHAPES)
    out = draw(SIZES)
    return [
        layer(draw(SIZES), in_shape, out, kind, draw(st.floats(-3, 3)), draw(st.integers(0, 99)))
        for _ in range(count)
    ]


# --- one layer


@settings(deadline=None)
@given(layers())
def test_delta_weight_is_the_sum_over_the_rank(drawn):
    (lora,) = drawn
    np.testing.assert_allclose(lora.delta_weight, dense(lora), rtol=1e-6, atol=1e-6)
    assert lora.delta_weight.dtype == np.float32


@settings(deadline=None)
@given(layers(), st.floats(-2, 2))
def test_scaled_and_normalized_keep_their_promise(drawn, factor):
    (lora,) = drawn
    np.testing.assert_allclose(lora.scaled(factor).delta_weight, factor * dense(lora), atol=1e-5)
    normalized = lora.normalized()
    assert normalized.scaling == 1.0
    np.testing.assert_allclose(normalized.delta_weight, dense(lora), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(layers())
def test_norm_is_that_of_the_dense_matrix(drawn):
    (lora,) = drawn
    # The Gram matrices square the condition number: near-cancelling sums keep half the digits.
    scale = float(abs(lora.scaling) * np.linalg.norm(lora.A) * np.linalg.norm(lora.B))
    assert lora.norm() == pytest.approx(
        np.linalg.norm(dense(lora)), rel=1e-6, abs=1e-7 * scale + 1e-30
    )


@settings(deadline=None)
@given(layers(), SIZES)
def test_truncated_is_the_best_of_its_rank(drawn, rank):
    (lora,) = drawn
    cut = lora.truncated(rank)
    assert cut.rank == min(rank, lora.rank)
    matrix = dense(lora).reshape(lora.out_features, -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    error = np.linalg.norm(dense(cut).reshape(matrix.shape) - matrix)
    # Eckart-Young: what is lost are the values beyond the rank. Factors are rounded to float32.
    assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-5, abs=1e-5)
    assert (cut.scaling, cut.kind, cut.in_shape) == (lora.scaling, lora.kind, lora.in_shape)


def test_truncated_factors_are_balanced():
    cut = layer(4, (6,), 5).truncated(2)
    flat = cut.A.reshape(2, -1)
    np.testing.assert_allclose(cut.B.T @ cut.B, flat @ flat.T, atol=1e-5)


def test_truncated_to_its_own_rank_is_the_same_layer():
    lora = layer(3)
    assert lora.truncated(3) is lora
    assert lora.truncated(9) is lora


def test_arrays_are_copied_and_read_only():
    A, B = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    lora = LoraLayer(A, B, 1.0)
    A[0, 0] = 9
    assert lora.A[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        lora.A[0, 0] = 2
    with pytest.raises(FrozenInstanceError):
        lora.scaling = 2.0


def test_read_only_view_of_writable_memory_is_copied():
    memory = np.ones((2, 3), np.float32)
    view = memory.view()
    view.flags.writeable = False
    lora = LoraLayer(view, np.ones((4, 2)), 1.0)
    memory[0, 0] = 9
    assert lora.A[0, 0] == 1


def test_large_finite_numbers_are_not_taken_for_infinities():
    big = np.full((1, 2), 3e38, np.float32)  # their squares overflow
    assert LoraLayer(big, np.ones((1, 1)), 1.0).A[0, 0] == np.float32(3e38)


ONE = np.ones((2, 3))
REFUSED = {
    "kind": ({"kind": "rnn"}, AdapterError, "kind: expected one of linear, conv, embedding, found"),
    "flat A": ({"A": np.ones(3)}, ShapeMismatchError, "A: expected (rank, in) with every size"),
    "kernel on linear": ({"A": np.ones((2, 3, 1))}, ShapeMismatchError, "found (2, 3, 1)"),
    "conv without kernel": ({"kind": "conv"}, ShapeMismatchError, "A: expected (rank, in, *kern"),
    "empty A": ({"A": np.ones((2, 0))}, ShapeMismatchError, "found (2, 0)"),
    "ranks": ({"B": np.ones((4, 3))}, ShapeMismatchError, "B: expected (out, rank) with rank 2 of"),
    "complex": ({"A": ONE * 1j}, ShapeMismatchError, "A: expected real numbers, found dtype comp"),
    "text": ({"A": "x"}, ShapeMismatchError, "A: expected real numbers, found dtype <U1"),
    "NaN": ({"A": [[1, 2, 3], [4, np.nan, np.nan]]}, NonFiniteError,
            "A: expected finite numbers, found nan at (1, 1) and 1 more"),
    "float64 overflow": ({"B": np.full((4, 2), 1e39)}, NonFiniteError, "found inf at (0, 0) and 7"),
    "scaling": ({"scaling": np.inf}, NonFiniteError, "scaling: expected a finite number, found"),
    "magnitude": ({"magnitude": np.ones(3)}, ShapeMismatchError, "magnitude: expected (4,), found"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_layer_that_makes_no_sense_is_refused(arguments, kind, text):
    with raises(kind, text):
        LoraLayer(**{"A": ONE, "B": np.ones((4, 2)), "scaling": 1.0, **arguments})


def test_dora_has_no_product():
    lora = layer(dora=True)
    for call in (
        lambda: lora.delta_weight,
        lambda: lora.scaled(2),
        lambda: lora.truncated(1),
        lora.norm,
        lambda: stack([small_adapter("dora")]),
    ):
        with raises(UnsupportedError, "DoRA normalizes the base's weight"):
            call()
    assert lora.normalized().magnitude is not None


# --- a whole adapter


@settings(deadline=None)
@given(layers(count=3))
def test_stack_is_the_sum(drawn):
    config = LoraConfig()
    both = stack([Adapter({"fc": lora}, config) for lora in drawn])
    expected = sum(dense(lora) for lora in drawn)
    np.testing.assert_allclose(both.delta_weight("fc"), expected, rtol=1e-5, atol=1e-5)
    assert both.ranks == (sum(lora.rank for lora in drawn),)


def test_stack_keeps_layers_of_only_one_adapter():
    first = Adapter({"a": layer(), "b": layer(seed=1)}, LoraConfig(variant="rslora"), "base")
    second = Adapter({"b": layer(3, seed=2), "c": layer(seed=3)}, LoraConfig())
    both = stack([first, second])
    assert list(both) == ["a", "b", "c"]
    assert both.ranks == (2, 5, 2)
    assert (both.config.rank, both.config.lora_alpha, both.config.variant) == (5, 5.0, "lora")
    assert both.base == "base"
    np.testing.assert_allclose(both.delta_weight("c"), second.delta_weight("c"), rtol=1e-6)


def test_stack_concatenates_exactly():
    first, second = layer(scaling=1.0), layer(scaling=1.0, seed=1)
    both = stack([Adapter({"a": first}, LoraConfig()), Adapter({"a": second}, LoraConfig())])
    np.testing.assert_array_equal(both["a"].A, np.concatenate([first.A, second.A]))
    np.testing.assert_array_equal(both["a"].B, np.concatenate([first.B, second.B], axis=1))


def test_stack_of_nothing_of_other_shapes_or_bases_is_refused():
    with raises(LayerMismatchError, "stack: expected at least one adapter"):
        stack([])
    one = Adapter({"a": layer()}, LoraConfig(), "x" * 64)
    with raises(ShapeMismatchError, "layer 'a': expected linear (3,) -> 4, found linear (5,) -> 4"):
        stack([one, Adapter({"a": layer(in_shape=(5,))}, LoraConfig())])
    with raises(BaseMismatchError, "expected adapters of one base, found xxxxxxxxxxxx, yyyyyyyyyy"):
        stack([one, replace(one, base="y" * 64)])
    assert common_base([replace(one, base=None)]) is None


def test_norm_of_an_adapter_is_over_all_layers():
    adapter = small_adapter()
    dense_norm = np.sqrt(sum(np.sum(dense(lora) ** 2) for lora in adapter.layers.values()))
    assert adapter.norm() == pytest.approx(dense_norm, rel=1e-6)


def test_truncated_adapter_says_so_in_its_config():
    cut = small_adapter().truncated(2)
    assert cut.ranks == (2, 1, 2, 2, 2)  # conv1 had 3, conv2 has 1
    assert (cut.config.rank, dict(cut.config.rank_pattern)) == (2, {})


def test_layers_are_sorted_and_cannot_be_changed():
    adapter = Adapter({"b": layer(), "a": layer(seed=1)}, LoraConfig())
    assert list(adapter) == ["a", "b"]
    assert len(adapter) == 2
    with pytest.raises(TypeError):
        adapter.layers["c"] = layer()
    with raises(LayerMismatchError, "no layer 'c' in this adapter of 2 layers"):
        adapter.delta_weight("c")


def test_sizes_are_counted():
    adapter = Adapter({"a": layer(dora=True)}, LoraConfig(variant="dora"))
    assert adapter.num_parameters == 2 * 3 + 4 * 2 + 4
    assert adapter.num_bytes == 4 * adapter.num_parameters
    assert repr(adapter) == "Adapter(1 layers, rank 2, 18 parameters)"
    assert "rank 1..3" in repr(small_adapter())


def test_adapter_without_layers_or_with_a_stray_magnitude_is_refused():
    with raises(LayerMismatchError, "at least one layer, found none"):
        Adapter({}, LoraConfig())
    with raises(LayerMismatchError, "expected the path of a module, found ''"):
        Adapter({"": layer()}, LoraConfig())
    with raises(AdapterError, "layer 'a': variant 'lora' and a magnitude that is present"):
        Adapter({"a": layer(dora=True)}, LoraConfig())
    with raises(AdapterError, "layer 'a': variant 'dora' and a magnitude that is missing"):
        Adapter({"a": layer()}, LoraConfig(variant="dora"))


CHANGES = {
    "A": lambda lora: replace(lora, A=np.nextafter(lora.A, np.float32(9))),
    "B": lambda lora: replace(lora, B=-lora.B),
    "scaling": lambda lora: lora.scaled(1 + 1e-15),
    "kind": lambda lora: replace(lora, kind="embedding"),
    "magnitude": lambda lora: replace(lora, magnitude=np.ones(4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_sees_every_part_of_a_layer(change):
    variant = "dora" if change == "magnitude" else "lora"
    before = Adapter({"a": layer(dora=variant == "dora")}, LoraConfig(variant=variant))
    after = before.map(CHANGES[change])
    assert before.fingerprint() != after.fingerprint()
    assert before != after
    assert before == Adapter(dict(before.layers), LoraConfig(variant=variant, rank=3), "base")


def test_fingerprint_sees_paths_and_does_not_change_between_versions():
    simple = LoraLayer(np.ones((1, 2)), np.ones((3, 1)), 2.0)
    a, b = (Adapter({path: simple}, LoraConfig()) for path in "ab")
    assert a.fingerprint() != b.fingerprint()
    assert a.fingerprint() == ("f4ea3945fcaa09a053f1dcd6cdd6912f0bf46e48aa81c7773b35775059877903")
    assert hash(a) == hash(Adapter({"a": simple}, LoraConfig()))


def test_layouts_are_compared_and_the_stranger_is_named():
    mine = Adapter({"a": layer(), "b": layer()}, LoraConfig())
    with raises(LayerMismatchError, "client 'c7': 1 missing layer(s): 'b'; 1 unexpected layer(s):"):
        mine.require_same_layout(Adapter({"a": layer(), "x": layer()}, LoraConfig()), "client 'c7'")
    other = Adapter({"a": layer(), "b": layer(3)}, LoraConfig())
    with raises(
        ShapeMismatchError, "client 'c7', layer 'b': expected A (2, 3) and B (4, 2), found"
    ):
        mine.require_same_layout(other, "client 'c7'")
    mine.require_same_layout(other, "client 'c7'", ranks=False)


@pytest.mark.parametrize("through", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapter_can_be_sent_to_another_process(through, variant):
    adapter = small_adapter(variant)
    again = through(adapter)
    assert again == adapter
    assert again.config == adapter.config
    assert again.base == adapter.base
    assert not any(layer.A.flags.writeable for layer in again.layers.values())


# --- the config

CONFIGS = {
    "rank": ({"rank": 0}, "rank: expected a whole number >= 1, found 0"),
    "rank true": ({"rank": True}, "rank: expected a whole number >= 1, found True"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number > 0, found nan"),
    "variant": ({"variant": "lokr"}, "variant: expected one of lora, rslora, dora, rsdora"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout: expected a probability in [0, 1), found 1.0"),
    "no target": ({"target_modules": ()}, "target_modules: expected names of modules"),
    "regex": ({"target_modules": "("}, "'(' is not a valid regular expression: missing )"),
    "pattern": ({"rank_pattern": {"(?i)x": 1}}, "'(?i)x' is not a valid regular expression"),
    "pattern rank": ({"rank_pattern": {"x": 0}}, "rank_pattern['x']: expected a whole number"),
    "pattern alpha": ({"alpha_pattern": {"x": 0}}, "alpha_pattern['x']: expected a finite number"),
    "layers": ({"layers": "first:2"}, "layers: expected 'last:N' with N >= 1, found 'first:2'"),
    "both": ({"layers": "last:1", "layers_to_transform": (1,)}, "exclude each other: remove one"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), CONFIGS.values(), ids=CONFIGS)
def test_config_that_makes_no_sense_is_refused(arguments, text):
    with raises(ConfigError, text):
        LoraConfig(**arguments)


def test_patterns_give_ranks_and_scalings_as_in_peft():
    config = LoraConfig(
        rank=8, lora_alpha=16, rank_pattern={"q_proj": 4, "^fc": 2, r"h\.\d+\.fc": 16},
        alpha_pattern={"fc": 3, "h.0.q_proj": 5},
    )  # fmt: skip
    assert config.resolve(["fc", "h.0.fc", "h.0.q_proj", "h.0.k_proj", "x.fc"]) == {
        "fc": (2, 1.5),
        "h.0.fc": (16, 3 / 16),
        "h.0.q_proj": (4, 1.25),
        "h.0.k_proj": (8, 2.0),
        "x.fc": (8, 3 / 8),
    }
    assert (config.rank_of("fc"), config.scaling_of("fc")) == (2, 1.5)
    assert replace(config, variant="rslora").scaling_of("h.0.q_proj") == 2.5


def test_config_copies_its_mappings():
    patterns = {"fc": 2}
    config = LoraConfig(rank_pattern=patterns)
    patterns["fc"] = 9
    assert config.rank_of("fc") == 2
    assert hash(config) == hash(LoraConfig(rank_pattern={"fc": 2}))
