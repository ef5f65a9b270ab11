"""The packed file: bytes, sizes, what it keeps, and what is refused."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.errors import (
    ConfigError,
    DigestMismatchError,
    FormatError,
    NonFiniteError,
    ShapeMismatchError,
)
from fedlora.formats import load_adapter, read_info, save_adapter
from fedlora.formats.codecs import CODECS
from fedlora.formats.packed import decode_packed, encode_packed
from fedlora.formats.peft import decode_peft, encode_peft
from fedlora.formats.tensors import dump_tensors, parse_tensors
from tests.formats.adapters import keyboard_adapter, small_adapter
from tests.golden.make_packed_files import ADAPTERS, FOLDER, packed_bytes
from tests.matching import raises
from tests.test_adapter import layers

VARIANTS = ("lora", "rslora", "dora", "rsdora")


def rewritten(data: bytes, change) -> bytes:
    """Return the file with its metadata changed, and the digest made right."""
    file = parse_tensors(data)
    header = json.loads(file.metadata["fedlora"])
    tensors = {name: file.array(name) for name in file.entries}
    change(header, tensors)
    body = dump_tensors(tensors)
    if header.get("sha256") == "right":
        header["sha256"] = hashlib.sha256(
            body[8 + int.from_bytes(body[:8], "little") :]
        ).hexdigest()
    return dump_tensors(tensors, {"fedlora": json.dumps(header)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_comes_back_bit_for_bit(variant):
    adapter = small_adapter(variant)
    data = encode_packed(adapter, "fp32", "cd" * 32, {"round": 3, "ε": 1.5})
    packed = decode_packed(parse_tensors(data))
    assert packed.adapter == adapter
    assert packed.adapter.config == adapter.config
    assert packed.adapter.base == adapter.base
    assert (packed.codec, packed.tokenizer) == ("fp32", "cd" * 32)
    assert packed.provenance == {"round": 3, "ε": 1.5}


@settings(deadline=None)
@given(layers(count=1), layers(count=1))
def test_any_shape_comes_back_from_both_formats(first, second):
    config = LoraConfig(rank=3, lora_alpha=2)
    adapter = Adapter({"a.0": first[0], "b": second[0]}, config)
    assert decode_packed(parse_tensors(encode_packed(adapter))).adapter == adapter
    for codec in CODECS[1:]:
        again = decode_packed(parse_tensors(encode_packed(adapter, codec))).adapter
        adapter.require_same_layout(again, codec)
    encoded, weights = encode_peft(adapter)
    again, _ = decode_peft(encoded, parse_tensors(weights))
    adapter.require_same_layout(again, "peft")
    for path in adapter:  # a sign of the scaling may have moved into B
        np.testing.assert_array_equal(again.delta_weight(path), adapter.delta_weight(path))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("codec", CODECS)
def test_same_adapter_gives_the_same_bytes_and_little_error(codec, variant):
    adapter = small_adapter(variant)
    shuffled = Adapter(dict(reversed(adapter.layers.items())), adapter.config, adapter.base)
    data = encode_packed(adapter, codec)
    assert encode_packed(shuffled, codec) == data
    again = decode_packed(parse_tensors(data)).adapter
    half_level = {"fp32": 0.0, "fp16": 2.0**-11, "int8": 0.5 / 127, "int4": 0.5 / 7}[codec]
    for path, layer in adapter.layers.items():
        other = again[path]
        rank = layer.rank
        for mine, theirs in (
            (layer.A.reshape(rank, -1), other.A.reshape(rank, -1)),
            (layer.B.T, other.B.T),
        ):
            largest = np.abs(mine).max(axis=1, keepdims=True)
            assert (np.abs(mine - theirs) <= largest * half_level * (1 + 1e-5)).all()
        if layer.magnitude is not None:
            error = np.abs(layer.magnitude - other.magnitude).max()
            assert error == 0 if codec != "fp16" else error < 2.0**-10
        assert (other.scaling, other.kind) == (layer.scaling, layer.kind)


def test_sizes_of_a_keyboard_adapter():
    adapter = keyboard_adapter()
    assert adapter.num_parameters == 460_800
    sizes = {codec: len(encode_packed(adapter, codec)) for codec in CODECS}
    assert sizes["fp32"] < 1_870_000
    assert sizes["fp16"] <= 950_000
    assert sizes["int8"] <= 500_000
    assert sizes["int4"] <= 260_000


def test_reading_and_writing_is_fast(tmp_path):
    adapter = keyboard_adapter()
    before = time.process_time()
    for codec in CODECS:
        save_adapter(adapter, tmp_path / "a.safetensors", codec=codec)
        load_adapter(tmp_path / "a.safetensors")
    assert time.process_time() - before < 2  # about 0.3 s


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_published_files_are_read_and_written_as_before(name, codec):
    path = FOLDER / f"{name}-{codec}.safetensors"
    assert packed_bytes(name, codec) == path.read_bytes()
    assert read_info(path).codec == codec
    assert load_adapter(path).base == "0" * 64


def test_equal_configs_give_equal_bytes():
    adapter = small_adapter()
    whole = replace(adapter, config=replace(adapter.config, lora_alpha=3.0))
    assert whole.config == adapter.config
    assert encode_packed(whole) == encode_packed(adapter)


def test_whole_digest_is_checked_first(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(small_adapter(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_adapter(path, sha256=digest.upper()) == small_adapter()
    with raises(DigestMismatchError, "expected SHA-256 000000000000…", "do not use it"):
        load_adapter(path, sha256="0" * 64)


def test_a_file_is_hashed_once_where_its_whole_digest_is_known(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(small_adapter(), path)
    hashed = []
    sha256 = hashlib.sha256
    digest = sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    load_adapter(path, sha256=digest)
    assert hashed == [path.stat().st_size]
    load_adapter(path)  # then the digest of its tensors is all that tells of damage
    assert len(hashed) == 2


def test_damaged_tensors_are_refused(tmp_path):
    data = bytearray(encode_packed(small_adapter()))
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with raises(DigestMismatchError, "a.safetensors: expected tensors with SHA-256", "damaged"):
        load_adapter(tmp_path / "a.safetensors")


def test_overflow_of_fp16_names_the_layer():
    layer = LoraLayer(np.ones((1, 2)), np.full((2, 1), 1e5), 1.0)
    adapter = Adapter({"fc": layer}, LoraConfig(rank=1, lora_alpha=1))
    with raises(NonFiniteError, "layer 'fc', B: codec fp16", "found 1e+05"):
        encode_packed(adapter, "fp16")
    decode_packed(parse_tensors(encode_packed(adapter, "int8")))


def test_unknown_codec_and_provenance_that_is_no_json_are_refused():
    with raises(ConfigError, "codec: expected one of fp32, fp16, int8, int4, found 'int3'"):
        encode_packed(small_adapter(), "int3")
    with raises(FormatError, "cannot be written as JSON"):
        encode_packed(small_adapter(), provenance={"epsilon": float("inf")})
    with raises(FormatError, "cannot be written as JSON"):
        encode_packed(small_adapter(), provenance={"when": object()})


def test_what_could_not_be_read_is_not_written(tmp_path):
    layer = LoraLayer(np.ones((1, 1)), np.ones((1, 1)), 1.0)
    config = LoraConfig(rank=1)
    many = Adapter({f"{'x' * 400}.{i}": layer for i in range(2000)}, config)
    for name in ("a.safetensors", "a"):
        with raises(FormatError, "expected a header of at most 1,048,576 bytes"):
            save_adapter(many, tmp_path / name)
        with raises(FormatError, "512"):
            save_adapter(Adapter({"x" * 513: layer}, config), tmp_path / name)
        with raises(FormatError, "at most 8 levels of nesting"):
            deep = {"a": [[[[[[[[[]]]]]]]]]}
            save_adapter(small_adapter(), tmp_path / name, provenance=deep)
    assert list(tmp_path.iterdir()) == []


def _set(key, value):
    return lambda header, tensors: header.__setitem__(key, value)


def _layer(key, value):
    return lambda header, tensors: header["layers"]["h.0.fc"].__setitem__(key, value)


def _config(key, value):
    return lambda header, tensors: header["config"].__setitem__(key, value)


def _tensor(name, value):
    return lambda header, tensors: tensors.__setitem__(name, value)


CHANGES = {
    "newer": (_set("version", 2), FormatError, "expected version 1 of the packed format"),
    "extra key": (_set("x", 2), FormatError, "expected metadata with base, codec"),
    "no layer": (_set("layers", {}), FormatError, "layers: expected an object with at"),
    "codec": (_set("codec", "fp8"), FormatError, "codec: expected one of fp32, fp16, int8, int4,"),
    "codec of another": (_set("codec", "int8"), FormatError, "missing tensor 'scales'"),
    "base": (_set("base", 5), FormatError, "base: expected a fingerprint or null, found 5"),
    "kind": (_layer("kind", "x"), None, "kind: expected one of linear, conv"),
    "kind of another": (_layer("kind", "conv"), ShapeMismatchError, "layer 'h.0.fc': A: expected"),
    "scaling": (_layer("scaling", "1"), FormatError, "layer 'h.0.fc': expected a path"),
    "shape": (_layer("A", [2, 8]), FormatError, "lora_A: expected F32 (2, 8) for codec fp32"),
    "ranks": (_layer("A", [3, 9]), FormatError, "layer 'h.0.fc': expected a path"),
    "huge": (_layer("A", [2, 2**60]), FormatError, "layer 'h.0.fc': expected a path"),
    "config key": (_config("rnk", 3), FormatError, "config: missing or unknown key 'rnk'"),
    "config rank": (_config("rank", 0), FormatError, "rank: expected a whole number >= 1"),
    "config type": (_config("lora_dropout", "0"), FormatError, "lora_dropout: expected a number"),
    "config list": (_config("layers_pattern", ["("]), FormatError, "layers_pattern: expected"),
    "config regex": (_config("target_modules", "("), FormatError, "not a valid regular expression"),
    "slow regex": (_config("rank_pattern", {"(a+)+": 1}), FormatError, "could take very long"),
    "variant": (_config("variant", "dora"), FormatError, "missing tensor 'conv1.lora_magnitude"),
    "extra tensor": (_tensor("x", np.ones(1, np.float32)), FormatError, "unexpected tensor 'x'"),
    "NaN": (_tensor("h.1.fc.lora_A.weight", np.full((2, 1), np.nan, np.float32)), None,
            "layer 'h.1.fc': A: expected finite numbers"),
    "dtype": (_tensor("h.1.fc.lora_A.weight", np.ones((2, 1), np.float16)), FormatError,
              "lora_A: expected F32 (2, 1) for codec fp32, found F16 (2, 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "text"), CHANGES.values(), ids=CHANGES)
def test_changed_file_is_refused_and_says_what_is_wrong(change, kind, text):
    def with_digest(header, tensors):
        header["sha256"] = "right"
        change(header, tensors)

    data = rewritten(encode_packed(small_adapter()), with_digest)
    caught = (FormatError, ShapeMismatchError, NonFiniteError) if kind is None else kind
    with pytest.raises(Exception) as error:
        decode_packed(parse_tensors(data))
    assert text in str(error.value)
    assert kind is None or error.type is caught
    assert error.type.__module__ == "fedlora.errors"


@pytest.mark.parametrize("count", [0, 1, 99])
def test_wrong_number_of_scales_is_refused(count):
    def change(header, tensors):
        header["sha256"] = "right"
        tensors["scales"] = np.ones(count, np.float32)

    data = rewritten(encode_packed(small_adapter(), "int8"), change)
    with raises(FormatError, "scales"):
        decode_packed(parse_tensors(data))


def test_weights_of_a_peft_folder_are_not_a_packed_file(tmp_path):
    save_adapter(small_adapter(), tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    with raises(FormatError, "name the folder that it is in"):
        load_adapter(weights)
    weights.rename(tmp_path / "renamed.safetensors")
    with raises(FormatError, "found ['fedlora', 'format']", "naming their folder"):
        load_adapter(tmp_path / "renamed.safetensors")
    Path(tmp_path / "plain.safetensors").write_bytes(dump_tensors({"a": np.ones(1, np.float32)}))
    with raises(FormatError, "expected one metadata key, 'fedlora', found []"):
        load_adapter(tmp_path / "plain.safetensors")
