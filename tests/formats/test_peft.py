"""PEFT folders without PEFT: committed files, and everything that is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from fedlora.adapter import Adapter, LoraConfig, LoraLayer, stack
from fedlora.errors import (
    FormatError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.formats import load_adapter, read_info, save_adapter
from fedlora.formats.peft import CONFIG_NAME, WEIGHTS_NAME, encode_peft
from fedlora.formats.tensors import dump_tensors, parse_tensors, read_tensors
from tests.formats.adapters import small_adapter
from tests.matching import raises

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns"])
def test_golden_folder_gives_the_deltas_that_peft_merged(name):
    adapter = load_adapter(GOLDEN / name)
    deltas = json.loads((GOLDEN / name / "outputs.json").read_text())["deltas"]
    assert list(adapter) == sorted(deltas)
    for path, delta in deltas.items():
        ours = adapter.delta_weight(path)
        # Rounded twice more: PEFT added the delta to a weight of about 1, and took it away again.
        np.testing.assert_allclose(ours.T if path == "embed" else ours, delta, atol=5e-7)


def test_golden_dora_folder_gives_the_magnitudes():
    adapter = load_adapter(GOLDEN / "dora")
    outputs = json.loads((GOLDEN / "dora" / "outputs.json").read_text())
    assert adapter.config.variant == "dora"
    for path, magnitude in outputs["magnitudes"].items():
        np.testing.assert_array_equal(adapter[path].magnitude, np.float32(magnitude))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "rsdora"])
def test_folder_keeps_adapter_config_base_and_provenance(variant, tmp_path):
    adapter = small_adapter(variant)
    save_adapter(adapter, tmp_path / "a", provenance={"round": 3})
    info = read_info(tmp_path / "a")
    assert info.adapter == adapter
    assert info.adapter.config == adapter.config
    assert info.adapter.base == adapter.base
    assert info.provenance == {"round": 3}
    assert info.num_bytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())


def test_same_adapter_gives_the_same_bytes():
    adapter = small_adapter()
    shuffled = Adapter(dict(reversed(adapter.layers.items())), adapter.config, adapter.base)
    assert encode_peft(shuffled) == encode_peft(adapter)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    save_adapter(small_adapter("dora"), tmp_path / "a")
    entries = read_tensors(tmp_path / "a" / WEIGHTS_NAME).entries
    shapes = {name.removeprefix("base_model.model."): e.shape for name, e in entries.items()}
    assert shapes["conv1.lora_B.weight"] == (5, 3, 1)
    assert shapes["conv2.lora_B.weight"] == (6, 1, 1, 1)
    assert shapes["conv1.lora_magnitude_vector"] == (1, 5, 1)
    assert shapes["conv2.lora_magnitude_vector"] == (1, 6, 1, 1)
    assert shapes["embed.lora_embedding_A"] == (2, 7)
    assert shapes["embed.lora_magnitude_vector"] == (5,)
    assert shapes["h.0.fc.lora_A.weight"] == (2, 9)


def test_stack_names_the_layers_whose_rank_or_scaling_differs(tmp_path):
    both = stack([small_adapter(), small_adapter(seed=1).scaled(0.3)])
    save_adapter(both, tmp_path / "a")
    keys = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert (keys["r"], keys["lora_alpha"]) == (6, 6)
    assert keys["rank_pattern"] == {
        "^conv2": 2, r"^embed": 4, r"^h\.0\.fc": 4, r"^h\.1\.fc": 4
    }  # fmt: skip
    assert keys["alpha_pattern"] == keys["rank_pattern"]  # every scaling is 1
    assert load_adapter(tmp_path / "a") == both


@pytest.mark.parametrize("rank", [1, 3, 7, 10, 64])
def test_every_scaling_comes_back_exactly(rank, tmp_path):
    rng = np.random.default_rng(rank)
    layers = {
        f"fc{i}": LoraLayer(np.ones((rank, 1)), np.ones((1, rank)), float(scaling))
        for i, scaling in enumerate(rng.uniform(0, 10, 100))
    }
    adapter = Adapter(layers, LoraConfig(rank=rank, target_modules="all-linear"))
    save_adapter(adapter, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert again == adapter
    for path, layer in layers.items():  # what PEFT computes without our metadata
        assert again.config.scaling_of(path) == pytest.approx(layer.scaling, rel=3e-16)


def test_path_that_ends_as_another_does_not_get_its_rank(tmp_path):
    layers = {
        "fc": LoraLayer(np.ones((2, 3)), np.ones((3, 2)), 1.0),
        "block.fc": LoraLayer(np.ones((4, 3)), np.ones((3, 4)), 1.0),
    }
    adapter = Adapter(layers, LoraConfig(rank=8))
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a") == adapter


def test_absent_keys_take_the_defaults_of_peft(tmp_path):
    adapter = Adapter(
        {"fc": LoraLayer(np.ones((8, 3)), np.ones((3, 8)), 1.0)},
        LoraConfig(rank=8, lora_alpha=8, target_modules=("fc",)),
    )
    _, weights = encode_peft(adapter)
    _write(tmp_path, {"peft_type": "LORA"}, weights)
    assert load_adapter(tmp_path) == adapter
    assert load_adapter(tmp_path).config == adapter.config


def test_config_of_six_keys_is_enough(tmp_path):
    six = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["fc"],
        "use_rslora": True, "use_dora": False,
    }  # fmt: skip
    tensors = {"base_model.model.a.fc.lora_A.weight": np.ones((2, 3), np.float32),
               "base_model.model.a.fc.lora_B.weight": np.ones((3, 2), np.float32)}  # fmt: skip
    _write(tmp_path, six, dump_tensors(tensors))
    assert load_adapter(tmp_path)["a.fc"].scaling == 3 / 2**0.5


# Values that a file of PEFT 0.21 may hold, and that fedlora does not compute.
UNSUPPORTED = {
    "bias": "all", "modules_to_save": ["head"], "megatron_config": {}, "use_qalora": True,
    "trainable_token_indices": [1], "velora_config": {"scale": 1.0}, "monteclora_config": {},
    "alora_invocation_tokens": [1], "layer_replication": [[0, 1]], "lora_bias": True,
    "target_parameters": ["w"], "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1},
    "kasa_config": {}, "ensure_weight_tying": True, "enable_lora": [True], "peft_type": "LOHA",
}  # fmt: skip


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_key_that_changes_the_mathematics_is_refused_by_name(key, tmp_path):
    _write_small(tmp_path, **{key: UNSUPPORTED[key]})
    with raises(UnsupportedError, f"{CONFIG_NAME}: {key}: expected", repr(UNSUPPORTED[key])):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", None, 1]
)
def test_initialization_that_changes_the_base_is_refused(init, tmp_path):
    _write_small(tmp_path, init_lora_weights=init)
    with raises(UnsupportedError, "init_lora_weights: expected one of", f"found {init!r}"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialization_that_leaves_the_base_alone_is_kept(init, tmp_path):
    _write_small(tmp_path, init_lora_weights=init)
    assert load_adapter(tmp_path).config.extra["init_lora_weights"] == init


def test_every_key_of_the_installed_peft_is_known():
    peft = pytest.importorskip("peft")
    from fedlora.formats.peft_config import _KNOWN

    assert set(peft.LoraConfig().to_dict()) - _KNOWN == set()


MALFORMED = {
    "unknown key": ({"lora_alfa": 3}, FormatError, "unknown key 'lora_alfa'; did you mean 'lora_a"),
    "rank is text": ({"r": "8"}, FormatError, "r: expected a whole number, found '8'"),
    "rank is true": ({"r": True}, FormatError, "r: expected a whole number, found True"),
    "rank 0": ({"r": 0}, FormatError, "rank: expected a whole number >= 1, found 0"),
    "alpha is text": ({"lora_alpha": "3"}, FormatError, "lora_alpha: expected a number"),
    "alpha negative": ({"lora_alpha": -3}, FormatError, "lora_alpha: expected a finite number > 0"),
    "alpha null": ({"lora_alpha": None}, FormatError, "lora_alpha: expected a number, found None"),
    "dropout": ({"lora_dropout": 1.5}, FormatError, "lora_dropout: expected a probability"),
    "flag": ({"use_dora": 1}, FormatError, "use_dora: expected true or false, found 1"),
    "targets": ({"target_modules": {"a": 1}}, FormatError, "target_modules: expected a list"),
    "no target": ({"target_modules": []}, FormatError, "target_modules: expected a list"),
    "excluded": ({"exclude_modules": 3}, FormatError, "exclude_modules: expected a list"),
    "excluded regex": ({"exclude_modules": "("}, FormatError, "'(' is not a valid regular expr"),
    "regex": ({"target_modules": "(fc"}, FormatError, "'(fc' is not a valid regular expression"),
    "regex too large": ({"target_modules": "a{99999999999}"}, FormatError, "not a valid regular"),
    "regex too deep": ({"target_modules": "(" * 4000 + ")" * 4000}, FormatError, "not a valid"),
    "exponential": ({"rank_pattern": {"(.*)*$": 1}}, FormatError, "could take very long"),
    "optional": ({"alpha_pattern": {"a?" * 40: 1}}, FormatError, "could take very long"),
    "alternatives": ({"alpha_pattern": {"(a|a)" * 40: 1}}, FormatError, "could take very long"),
    "stars": ({"alpha_pattern": {".*" * 9: 1}}, FormatError, "could take very long"),
    "backreference": ({"rank_pattern": {r"(.)\1+": 1}}, FormatError, "could take very long"),
    "long regexes": ({"rank_pattern": {"(a)" * 3000: 1}}, FormatError, "at most 8192 characters"),
    "rank table": ({"rank_pattern": {"fc": "1"}}, FormatError, "rank_pattern: expected an object"),
    "rank fraction": ({"rank_pattern": {"fc": 1.5}}, FormatError, "rank_pattern['fc']: expected"),
    "many block lists": ({"layers_pattern": ["h"] * 5}, FormatError, "layers_pattern: expected"),
    "layers": ({"layers_to_transform": ["0"]}, FormatError, "layers_to_transform: expected"),
    "blocks": ({"layers_pattern": ["h("]}, FormatError, "layers_pattern: expected names of lists"),
    "another rank": ({"r": 3}, ShapeMismatchError, "layer 'embed': expected rank 3 as in adapter"),
    "other targets": ({"target_modules": ["fc"]}, LayerMismatchError,
                      "3 layer(s) of the file are not in target_modules, the first is 'conv1'"),
    "absent target": ({"target_modules": ["fc", "embed", "conv1", "conv2", "up"]},
                      LayerMismatchError, "target_modules names 'up', of which the file has no"),
    "layer excluded": ({"exclude_modules": ["1.fc"]}, LayerMismatchError,
                       "1 layer(s) of the file are not in target_modules, the first is 'h.1.fc'"),
    "other block": ({"layers_to_transform": [0], "layers_pattern": "h"}, LayerMismatchError,
                    "are not in target_modules"),
    "no magnitude": ({"use_dora": True}, LayerMismatchError,
                     "layer 'conv1': lora_magnitude is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "kind", "text"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_config_is_refused_in_time(keys, kind, text, tmp_path):
    _write_small(tmp_path, **keys)
    before = time.thread_time()
    with raises(kind, str(tmp_path), text):
        load_adapter(tmp_path)
    assert time.thread_time() - before < 0.1


def test_slow_regex_in_target_modules_is_not_tried(tmp_path):
    adapter = Adapter(
        {"a" * 40: LoraLayer(np.ones((8, 3)), np.ones((3, 8)), 1.0)},
        LoraConfig(target_modules="all-linear"),
    )
    _, weights = encode_peft(adapter)
    _write(tmp_path, {"peft_type": "LORA", "target_modules": "(a+)+b"}, weights)
    before = time.thread_time()
    loaded = load_adapter(tmp_path)
    save_adapter(loaded, tmp_path)
    assert time.thread_time() - before < 0.5
    keys = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert keys["target_modules"] == ["a" * 40]


def test_much_of_everything_is_fast(tmp_path):
    """As many names, patterns, indices and layers as the limits on sizes allow."""
    tensors = {}
    for i in range(800):
        path = ".".join(["m"] * 30 + [str(i)])
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ones((1, 1), np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ones((1, 1), np.float32)
    config = {
        "peft_type": "LORA", "r": 1,
        "target_modules": [str(i) for i in range(800)] + ["m"] * 15_000,
        "exclude_modules": ["x"] * 5_000,
        "layers_to_transform": list(range(10_000)), "layers_pattern": ["m"] * 4,
        "alpha_pattern": {f"a{i}": 2 for i in range(3000)},
    }  # fmt: skip
    _write(tmp_path, config, dump_tensors(tensors))
    before = time.thread_time()
    with raises(LayerMismatchError, "800 layer(s) of the file are not in target_modules"):
        load_adapter(tmp_path)
    assert time.thread_time() - before < 0.2  # about 0.08 s: twice the bound of a small file


def test_a_pattern_for_each_of_many_layers_is_fast(tmp_path):
    layers = {
        f"model.layers.{i}.self_attn.{name}": LoraLayer(
            np.ones((1 + i % 5, 2)), np.ones((2, 1 + i % 5)), 1 + i / 7
        )
        for i in range(100)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    adapter = Adapter(layers, LoraConfig(rank=3))
    _, weights = encode_peft(adapter)
    patterns = {path: layer.rank for path, layer in layers.items()}  # unescaped, as EVA writes
    config = {"peft_type": "LORA", "r": 3, "rank_pattern": patterns}
    before = time.process_time()
    _write(tmp_path, {**config, "alpha_pattern": {p: layers[p].scaling * r for p, r in
                                                  patterns.items()}}, weights)  # fmt: skip
    assert load_adapter(tmp_path).ranks == adapter.ranks
    assert time.process_time() - before < 1  # about 0.05 s; quadratic work took 40 s


def _drop(name):
    return lambda tensors: tensors.pop(f"base_model.model.{name}")


def _put(name, value):
    return lambda tensors: tensors.__setitem__(name, np.asarray(value))


F = np.float32
TENSORS = {
    "no A": (_drop("h.0.fc.lora_A.weight"), LayerMismatchError, "'h.0.fc': lora_A is missing"),
    "no B": (_drop("embed.lora_embedding_B"), LayerMismatchError,
             "layer 'embed': lora_embedding_B is missing"),
    "stranger": (_put("base_model.model.fc.weight", F([1])), LayerMismatchError,
                 "unexpected tensor 'base_model.model.fc.weight'"),
    "no prefix": (_put("fc.lora_A.weight", F([[1]])), LayerMismatchError,
                  "unexpected tensor 'fc.lora_A.weight'"),
    "bias": (_put("base_model.model.h.0.fc.lora_B.bias", F([1])), LayerMismatchError,
             "unexpected tensor 'base_model.model.h.0.fc.lora_B.bias'"),
    "magnitude": (_put("base_model.model.h.0.fc.lora_magnitude_vector", F([1] * 4)),
                  LayerMismatchError, "unexpected lora_magnitude with use_dora=False"),
    "both kinds": (_put("base_model.model.h.0.fc.lora_embedding_A", np.ones((2, 9), F)),
                   LayerMismatchError, "layer 'h.0.fc': lora_embedding_B is missing"),
    "only a base layer": (_put("base_model.model.x.base_layer.weight", F([[1]])),
                          LayerMismatchError, "the first is 'x'"),
    "swapped": (_put("base_model.model.h.0.fc.lora_A.weight", np.ones((9, 2), F)),
                ShapeMismatchError, "layer 'h.0.fc': B: expected (out, rank) with rank 9"),
    "flat A": (_put("base_model.model.h.0.fc.lora_A.weight", np.ones(9, F)), ShapeMismatchError,
               "layer 'h.0.fc': A: expected (rank, in)"),
    "empty": (_put("base_model.model.h.0.fc.lora_A.weight", np.ones((2, 0), F)),
              ShapeMismatchError, "layer 'h.0.fc': A: expected (rank, in) with every size >= 1"),
    "groups": (_put("base_model.model.conv1.lora_B.weight", np.ones((6, 1, 1), F)),
               UnsupportedError, "layer 'conv1': convolution: expected lora_B ('out', 3, 1)"),
    "NaN": (_put("base_model.model.h.0.fc.lora_A.weight", np.full((2, 9), np.nan, F)),
            NonFiniteError, "layer 'h.0.fc': A: expected finite numbers, found nan"),
    "integers": (_put("base_model.model.h.0.fc.lora_A.weight", np.ones((2, 9), np.int8)),
                 FormatError, "expected F32, F16 or BF16, found int8"),
    "nothing": (lambda tensors: tensors.clear(), LayerMismatchError, "found no tensor"),
    "long path": (_put(f"base_model.model.{'a' * 600}.lora_A.weight", F([[1]])), FormatError,
                  "at most 512 printable characters"),
    "deep path": (_put(f"base_model.model.{'a.' * 32}b.lora_A.weight", F([[1]])), FormatError,
                  "expected the path of a module"),
    "control characters": (_put("base_model.model.a\x1b[31m.lora_A.weight", F([[1]])),
                           FormatError, "printable characters"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "text"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_are_named(change, kind, text, tmp_path):
    config, weights = encode_peft(small_adapter())
    file = parse_tensors(weights)
    tensors = {name: file.array(name) for name in file.entries}
    change(tensors)
    _write(tmp_path, json.loads(config), dump_tensors(tensors))
    with raises(kind, text):
        load_adapter(tmp_path)


def test_scalings_in_the_metadata_may_only_refine_those_of_the_config(tmp_path):
    config, weights = encode_peft(small_adapter())
    file = parse_tensors(weights)
    ours = json.loads(file.metadata["fedlora"])
    ours["scalings"] = {"h.0.fc": 99.0}
    tensors = {name: file.array(name) for name in file.entries}
    _write(tmp_path, json.loads(config), dump_tensors(tensors, {"fedlora": json.dumps(ours)}))
    with raises(FormatError, "layer 'h.0.fc': expected scaling 3.5", "found 99.0"):
        load_adapter(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    _write_small(tmp_path)
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "adapter_model.bin")
    with raises(FormatError, f"expected {WEIGHTS_NAME}, found adapter_model.bin; a pickle can run"):
        load_adapter(tmp_path)
    with raises(FormatError, "found '.bin'; a pickle can run code"):
        load_adapter(tmp_path / "adapter_model.bin")


def _write_small(folder: Path, **keys: object) -> None:
    config, weights = encode_peft(small_adapter())
    _write(folder, {**json.loads(config), **keys}, weights)


def _write(folder: Path, config: dict[str, object], weights: bytes) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    (folder / WEIGHTS_NAME).write_bytes(weights)
