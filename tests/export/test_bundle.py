"""A bundle is written whole, checked against torch, the same bytes again, and only when needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedlora.adapter import Adapter, LoraConfig
from fedlora.bases.registry import tokenizer_file
from fedlora.data.text import load_tokenizer
from fedlora.device.canaries import drift, read_canaries
from fedlora.device.manifest import Manifest, factors_of, read_manifest, verify_files
from fedlora.device.session import Session
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    RunError,
    UnsupportedError,
)
from fedlora.export import bundle as module
from fedlora.export import parity
from fedlora.export.bundle import export_bundle
from fedlora.export.trace import subject_of
from fedlora.export.traced import Traced
from fedlora.nn import (
    Base,
    extract_adapter,
    inject_lora,
    load_adapter_into,
    load_base,
    merge_lora,
    remove_lora,
)
from fedlora.nn.classifier import Classifier
from fedlora.nn.load import card_of
from tests.export.models import gpt2
from tests.export.test_trace import fetched
from tests.nn.models import Mlp, TiedLm, seeded

WATCH = LoraConfig(target_modules=("conv1", "hidden"))


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("watch") / "bundle"
    return folder, export_bundle("watch-cnn", folder, lora=WATCH)


def small(model: nn.Module | None = None, task: str = "classification") -> Base:
    model = (model or seeded(Mlp)).eval().requires_grad_(False)
    return Base(model, card_of(model, "tests:small", task), None)


def once(trace: Callable[..., Traced]) -> Callable[..., Traced]:
    """Return what traces a graph at its first call, and gives the same one at others."""
    found: list[Traced] = []

    def traced(*arguments: object, **options: object) -> Traced:
        if not found:
            found.append(trace(*arguments, **options))
        return found[0]

    return traced


def logits_of(folder: Path, inputs: np.ndarray, adapter: Adapter | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / "infer.onnx"), options)
    feed = {"inputs": inputs} | ({} if adapter is None else dict(factors_of(adapter)))
    logits: np.ndarray = session.run(["logits"], feed)[0]
    return logits


def test_a_bundle_says_what_it_is(watch: tuple[Path, Manifest]) -> None:
    folder, manifest = watch
    card = load_base("watch-cnn").card
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "base.onnx.data", "canaries.safetensors", "infer.onnx", "train_16.onnx",
    }  # fmt: skip
    there = read_manifest(folder)
    verify_files(folder, there)
    assert there.base == card.fingerprint == manifest.base
    assert set(there.layers) == {"conv1", "hidden"}
    assert (there.task, there.input_shape, there.input_dtype) == (
        "classification", (6, 100), "float32",
    )  # fmt: skip
    assert (there.outputs, there.labels, there.merged) == (7, card.labels, None)
    assert there.made_by["torch"] == torch.__version__
    for graph in there.graphs.values():
        assert 0 < graph.difference < 1e-5
    assert there.graphs["train_16.onnx"].rows == 16


def test_a_bundle_has_canaries_which_the_base_still_sings(watch: tuple[Path, Manifest]) -> None:
    folder, manifest = watch
    canaries = read_canaries(folder, manifest)
    assert canaries is not None
    assert (canaries.inputs.shape, canaries.logits.shape) == ((2, 6, 100), (2, 7))
    # The same graph, perhaps on another number of threads.
    assert drift(Session(folder), canaries) < 1e-6


def test_the_same_bundle_again_is_the_same_bytes(
    watch: tuple[Path, Manifest], tmp_path: Path
) -> None:
    folder, manifest = watch
    assert export_bundle("watch-cnn", tmp_path / "again", lora=WATCH).files == manifest.files
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_bundle_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "bundle", small()
    first = export_bundle(base, out, train=["2"])
    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "replace_folder", lambda *a, **k: pytest.fail("made again"))
        assert export_bundle(base, out, train=["2"], report=lines.append).files == first.files
    assert "already" in lines[0]
    # Other graphs, other layers, another precision or a damaged file: it is made anew.
    assert set(export_bundle(base, out, train=["3"]).graphs) == {"infer.onnx", "train_3.onnx"}
    assert not (out / "train_2.onnx").exists()
    other = LoraConfig(target_modules=("first",))
    assert set(export_bundle(base, out, lora=other, train=["3"]).layers) == {"first"}
    data = (out / "base.onnx.data").read_bytes()
    (out / "base.onnx.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    repaired = export_bundle(base, out, lora=other, train=["3"])
    verify_files(out, repaired)
    export_bundle(base, out, lora=other, train=["3"], again=True, report=lines.append)
    assert "tracing" in lines[-1] or "differs" in lines[-1]


def test_weights_are_stored_once_for_all_graphs(watch: tuple[Path, Manifest]) -> None:
    folder, _ = watch
    model = load_base("watch-cnn").model
    found = {}
    for name in ("infer.onnx", "train_16.onnx"):
        graph = onnx.load(str(folder / name), load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.external_data:
                about = {entry.key: entry.value for entry in tensor.external_data}
                assert found.setdefault(tensor.name, about) == about
    assert "conv1.weight" in found
    largest = sum(-(-p.numel() * 4 // 4096) * 4096 for p in model.parameters())
    assert (folder / "base.onnx.data").stat().st_size <= largest


def test_an_adapter_of_any_rank_runs_on_a_bundle(watch: tuple[Path, Manifest]) -> None:
    folder, manifest = watch
    model = load_base("watch-cnn").model
    inputs = np.random.default_rng(0).normal(size=(3, 6, 100)).astype(np.float32)
    for rank in (1, 5):
        inject_lora(model, LoraConfig(rank=rank, target_modules=tuple(manifest.layers)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        adapter = extract_adapter(model)
        with torch.no_grad():
            expected = model(torch.from_numpy(inputs)).numpy()
        remove_lora(model)
        # Sums of float32 in another order; logits of the order of 10.
        np.testing.assert_allclose(logits_of(folder, inputs, adapter), expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_merged_bundle_holds_the_adapter_in_its_weights(variant: str, tmp_path: Path) -> None:
    base = small()
    config = LoraConfig(rank=2, variant=variant, target_modules=("first", "second"))  # type: ignore[arg-type]
    inject_lora(base.model, config)
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            torch.manual_seed(parameter.numel())
            parameter.data += torch.randn(parameter.shape) * 0.3
    adapter = extract_adapter(base.model)
    remove_lora(base.model)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    manifest = export_bundle(base, tmp_path / "b", merge=adapter)
    assert set(manifest.graphs) == {"infer.onnx"}, "it takes no other adapter"
    assert manifest.merged == adapter.fingerprint()
    assert manifest.base == base.card.fingerprint
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    inject_lora(base.model, config)
    load_adapter_into(base.model, adapter)
    merge_lora(base.model)
    inputs = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with torch.no_grad():
        expected = base.model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(logits_of(tmp_path / "b", inputs), expected, atol=1e-6)


def test_a_web_bundle_asks_for_all_factors(tmp_path: Path) -> None:
    manifest = export_bundle(small(), tmp_path / "b", web=True, train=["2"])
    assert manifest.web
    graph = onnx.load(str(tmp_path / "b" / "infer.onnx"), load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    assert "first.lora_A.weight" in inputs
    assert not inputs & {tensor.name for tensor in graph.initializer}


def test_a_language_model_gets_its_decode_graph(tmp_path: Path) -> None:
    base = small(gpt2(layers=1), "next-token")
    out = tmp_path / "b"
    lora = LoraConfig(target_modules=("c_attn",))
    manifest = export_bundle(base, out, lora=lora, decode=True, train=["2x7"])
    assert set(manifest.graphs) == {"infer.onnx", "decode.onnx", "train_2x7.onnx"}
    step = manifest.graphs["train_2x7.onnx"]
    assert (step.rows, step.positions) == (2, 7)
    assert (manifest.input_shape, manifest.outputs) == ((), 40)


def test_graphs_that_differ_from_torch_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(small(), tmp_path / "b", train=["2"])
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    for name in ("infer_graph", "train_graph"):  # the same ones each time
        monkeypatch.setattr(module, name, once(getattr(module, name)))
    for name, graph in (("infer_difference", "infer"), ("train_difference", "train_3")):
        for found in (1e-3, float("nan")):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, lambda *a, found=found: found)
                with pytest.raises(RunError, match=rf"^{graph}\.onnx: expected at most"):
                    export_bundle(small(), tmp_path / "b", train=["3"])
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_one_nan_among_good_differences_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Session:
        calls = 0

        def run(self, names: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.calls += 1
            value = np.nan if self.calls == 3 else 0.0
            return [np.full((len(feed["inputs"]), 3), value, np.float32)]

    session = Session()
    monkeypatch.setattr(parity, "_session", lambda path: session)
    subject = subject_of(seeded(Mlp).eval(), ["first"], "classification", (6,))
    with np.errstate(invalid="ignore"):
        found = parity.infer_difference(Path("infer.onnx"), subject, {})
    assert session.calls > 3
    assert np.isnan(found)


def test_a_tokenizer_that_a_function_returned_goes_into_the_bundle(tmp_path: Path) -> None:
    path = tokenizer_file("tiny-chat")
    model = seeded(TiedLm).eval().requires_grad_(False)
    card = card_of(model, "tests:small", "next-token")
    for name, tokenizer in (("object", load_tokenizer(path)), ("text", str(path))):
        base = Base(model, card, tokenizer)
        lora = LoraConfig(target_modules=("mix",))
        manifest = export_bundle(base, tmp_path / name, lora=lora, train=())
        assert "tokenizer.json" in manifest.files
        again = export_bundle(base, tmp_path / name, lora=lora, train=())
        assert again == manifest
        found = load_tokenizer(tmp_path / name).encode("see you there").ids
        assert found == load_tokenizer(path).encode("see you there").ids


def other_base() -> Adapter:
    subject_model = seeded(Mlp)
    inject_lora(subject_model, LoraConfig(target_modules=("first",)), base="other")
    return extract_adapter(subject_model)


def other_layers() -> Adapter:
    layer = other_base()["first"]
    return Adapter({"third": layer}, LoraConfig(target_modules=("third",)))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lora": LoraConfig(variant="dora")}, UnsupportedError, "with --merge"),
        ({"train": ["2x3"]}, ConfigError, "expected a number of rows such as 16"),
        ({"train": ["0"]}, ConfigError, "--train"),
        ({"decode": True}, UnsupportedError, "leave --decode out"),
        ({"merge": other_base()}, BaseMismatchError, "made for base other"),
        ({"merge": other_layers()}, LayerMismatchError, "merge: the model has no layer 'third'"),
        ({"merge": other_layers(), "train": ["2"]}, ConfigError, "--merge goes without --train"),
        ({"lora": LoraConfig(target_modules=("no",))}, ConfigError, "'no'"),
        ({"input_shape": (5,)}, ConfigError, r"Mlp cannot run on inputs of shape \(2, 5\)"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    options: dict[str, object], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        export_bundle(small(), tmp_path / "b", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_base_without_a_head_or_a_shape_is_refused(tmp_path: Path) -> None:
    body = small(gpt2().transformer, "embedding")
    with pytest.raises(ConfigError, match=r"has no head .* --num-classes"):
        export_bundle(body, tmp_path / "b")
    conv = small(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2)))
    with pytest.raises(ConfigError, match="--input-shape, such as"):
        export_bundle(conv, tmp_path / "b")
    lora = LoraConfig(target_modules=("0",))
    made = export_bundle(conv, tmp_path / "b", lora=lora, input_shape=(2, 5), train=())
    assert (made.input_shape, set(made.graphs)) == ((2, 5), {"infer.onnx"})


def test_a_new_head_of_zeros_needs_lora(tmp_path: Path) -> None:
    base = small(Classifier(gpt2().eval(), 3))
    with pytest.raises(ConfigError, match="add zero_head to --target-modules"):
        export_bundle(base, tmp_path / "b", lora=LoraConfig(target_modules=("c_attn",)))
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_files_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    said: list[str] = []
    with pytest.raises(RunError, match=r"thesis\.txt"):
        export_bundle(small(), tmp_path / "b", train=["2"], report=said.append)
    assert said == [], "before any work"
    assert (tmp_path / "b" / "thesis.txt").read_text() == "years of work"


def test_a_quantized_bundle_records_its_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("infer_graph", "train_graph"):  # only what is made of them differs
        monkeypatch.setattr(module, name, once(getattr(module, name)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=128, n_layer=2, n_head=2))
    model.config.use_cache = False
    base, lora = small(model, "next-token"), LoraConfig(target_modules=("c_attn",))
    made = {
        precision: export_bundle(
            base, tmp_path / precision, lora=lora, train=["2x5"], precision=precision
        )
        for precision in ("fp32", "int8", "int4")
    }
    for precision in ("int8", "int4"):
        assert made[precision].precision == precision
        assert 1e-6 < made[precision].graphs["infer.onnx"].difference < 0.5
    # Of 1.9 MB 0.5 MB are positions and a tied table, of which the first become int8.
    sizes = {name: one.files["base.onnx.data"].num_bytes for name, one in made.items()}
    assert sizes["int4"] < 0.75 * sizes["int8"] < 0.3 * sizes["fp32"]


def test_a_bundle_without_quantized_weights_does_not_call_itself_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit = module.emit
    with monkeypatch.context() as patched:
        patched.setattr(module, "emit", lambda *a, precision, **more: emit(*a, **more))
        with pytest.raises(UnsupportedError, match="that could be quantized, found none"):
            export_bundle(small(), tmp_path / "b", precision="int8", train=["2"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("minilm", {"num_classes": 4, "train": ["8x32"]}),
        ("smollm2-135m", {"decode": True, "train": ["2x64"]}),
    ],
)
def test_fetched_bases_are_exported(id: str, options: dict[str, object], tmp_path: Path) -> None:
    fetched(id)
    manifest = export_bundle(id, tmp_path / "b", **options)  # type: ignore[arg-type]
    base = manifest.files["base.onnx.data"].num_bytes
    weights = sum(p.numel() * 4 for p in load_base(id).model.parameters())
    assert base <= 1.01 * weights  # once, and each rounded up to a page
