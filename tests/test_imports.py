"""Who may import whom: DESIGN's layers, where torch is allowed, and what `import fedlora` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedlora

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; a module may import what is in a row below its own.
ROWS = [
    {"conditions", "errors", "files", "imports", "low_rank", "patterns", "plain", "randomness"},
    {"adapter", "flat", "lora_config", "targets", "training"},
    {"aggregation", "privacy", "formats", "store", "metrics"},
    {
        "experiment",
        "personalization",
        "mixing",
        "evaluation",
        "nn",
        "bases",
        "data",
        "world",
        "report",
    },
    {"simulation", "federation", "export", "device", "ota"},
    {"agent", "release", "web"},
    {"cli", "clients", "server", "simulations"},
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
# Inside a row: the module on the left may import those on the right.
BESIDE: dict[str, set[str]] = {
    "conditions": {"errors"},
    "targets": {"adapter", "patterns"},
    "adapter": {"lora_config"},
    "flat": {"adapter", "training"},
    "training": {"adapter"},
    "store": {"formats"},
    "simulation": {"federation"},
    "export": {"device"},
    "ota": {"device"},
    "mixing": {"evaluation", "nn", "data"},
    "personalization": {"mixing", "evaluation", "nn", "bases", "data", "experiment", "world"},
    "evaluation": {"nn", "bases", "data"},
    "world": {"nn", "bases", "data", "experiment"},
    "experiment": {"bases", "data"},
    "report": {"experiment"},
    "nn": {"bases", "data"},
    "bases": set(),
    "data": {"bases"},
}
TORCH = {"nn", "world", "evaluation", "mixing", "personalization", "export", "simulation"}
# A base, unit or list of names that everyone may use, in whatever row.
GROUND = ROWS[0]


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (unit, file): the unit is fedlora's module or package, clients or server."""
    for path in sorted((ROOT / "fedlora").rglob("*.py")):
        part = path.relative_to(ROOT / "fedlora").parts[0]
        yield part.removesuffix(".py"), path
    for folder in ("clients", "server"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


@cache  # several tests look through all files
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file that say what it imports and when."""
    kinds = (ast.Import, ast.ImportFrom, ast.If)
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(node for node in tree if isinstance(node, kinds))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every imported dotted name, at any depth in the file, with its line."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "fedlora":
                for alias in node.names:
                    yield f"fedlora.{alias.name}", node.lineno


def only_for_types(path: Path) -> set[int]:
    """Return the lines under ``if TYPE_CHECKING``, which never run."""
    lines: set[int] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= {n.lineno for n in ast.walk(node) if hasattr(n, "lineno")}
    return lines


def test_imports_go_down_the_layers_only() -> None:
    wrong = []
    for unit, path in sources():
        if unit in ("__init__", "__main__"):
            continue
        assert unit in ROW_OF, f"{unit}: add the new module to a row above"
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] == "fedlora" and len(parts) > 1:
                target = parts[1]
            elif parts[0] in ("clients", "server", "simulations"):
                target = parts[0]
            else:
                continue
            if target not in ROW_OF or target == unit or target in GROUND:
                continue
            down = ROW_OF[target] < ROW_OF[unit]
            if not down and target not in BESIDE.get(unit, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_torch_is_imported_where_the_design_allows_it_only() -> None:
    wrong = []
    for unit, path in sources():
        allowed = unit in TORCH or path == ROOT / "clients" / "torch_app.py"
        # A command may call what needs torch, once it runs; `fedlora --help` must not wait for it.
        ours = () if unit == "cli" else ("fedlora.nn", "fedlora.world")
        typing_only = only_for_types(path)
        for name, line in imported(path):
            heavy = name.split(".")[0] == "torch" or name.startswith(ours)
            if heavy and not allowed and line not in typing_only:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_peft_is_never_imported_by_the_library() -> None:
    assert [
        p for _, p in sources() for name, _ in imported(p) if name.split(".")[0] == "peft"
    ] == []


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "modules",
    ["fedlora", "fedlora, fedlora.experiment, fedlora.data, fedlora.bases, fedlora.targets"],
)
def test_the_core_pulls_in_no_heavy_package(modules: str) -> None:
    heavy = (
        "torch", "flwr", "ray", "onnxruntime", "tuf", "matplotlib", "dp_accounting", "transformers",
        "tokenizers", "typer", "peft",
    )  # fmt: skip
    code = f"import sys\nimport {modules}\nprint([n for n in {heavy!r} if n in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "modules",
    [
        "fedlora.federation, fedlora.agent, server.app, server.publish, clients.app, clients.agent",
        "fedlora.cli.main",
    ],
)
def test_neither_server_nor_command_line_pulls_in_torch(modules: str) -> None:
    heavy = ("torch", "ray", "transformers", "matplotlib")
    code = f"import sys\nimport {modules}\nprint([n for n in {heavy!r} if n in sys.modules])"
    assert run_python(code) == "[]"


def test_a_client_process_imports_what_a_training_in_onnx_runtime_needs_and_no_more() -> None:
    code = (
        "import sys\nimport flwr.clientapp\nbefore = set(sys.modules)\n"
        "import clients.app, clients.onnx_app\nprint(*sorted(set(sys.modules) - before))"
    )
    found = run_python(code).split()
    packages = {name.split(".")[0] for name in found if not name.startswith("_")}
    # gzip is the standard library's, for data files; safetensors comes with the formats.
    assert packages - sys.stdlib_module_names - {"numpy"} <= {
        "clients", "fedlora", "onnxruntime", "safetensors",
    }  # fmt: skip
    unwanted = (
        "bases", "cli", "federation.checkpoint", "federation.sampling", "federation.server",
        "federation.strategy", "federation.deploy", "nn", "personalization", "simulation", "world",
    )  # fmt: skip
    assert [name for name in unwanted if f"fedlora.{name}" in found] == []


def test_importing_fedlora_alone_imports_nothing_else_of_it() -> None:
    code = "import sys, fedlora\nprint(*(n for n in sys.modules if n.startswith('fedlora.')))"
    assert run_python(code) == ""
    code = "import fedlora, sys\nfedlora.Adapter\nprint('fedlora.formats' in sys.modules)"
    assert run_python(code) == "False"


def test_what_a_client_process_adds_to_flower_takes_less_than_a_second() -> None:
    code = (
        "import flwr.clientapp, time\nstart = time.process_time()\n"
        "import clients.app, clients.onnx_app\nprint(time.process_time() - start)"
    )
    # Measured: 0.25 to 0.4 s of processor time; the best of three, and room for slow machines.
    assert any(float(run_python(code)) < 1.0 for _ in range(3))


def test_over_the_air_needs_neither_torch_nor_flower_nor_onnx_runtime() -> None:
    heavy = ("torch", "flwr", "onnxruntime", "tokenizers", "transformers", "typer")
    modules = "fedlora.ota.publisher, fedlora.ota.updater, fedlora.ota.conformance"
    code = f"import sys\nimport {modules}\nprint([n for n in {heavy!r} if n in sys.modules])"
    assert run_python(code) == "[]"
    code = "import sys\nimport fedlora.ota, fedlora.cli.ota\nprint('tuf' in sys.modules)"
    assert run_python(code) == "False"


def test_only_an_epsilon_that_is_asked_for_imports_the_accountants() -> None:
    heavy = ("dp_accounting", "scipy", "absl", "cryptography")
    found = f"print([n for n in {heavy!r} if n in sys.modules])"
    modules = "fedlora.privacy, fedlora.privacy.accounting, fedlora.privacy.ledger"
    assert run_python(f"import sys\nimport {modules}\n{found}") == "[]"
    help_text = "import sys; sys.argv = ['fedlora', 'privacy', '--help']\n"
    run = "from fedlora.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    assert run_python(help_text + run + found).endswith("[]")


def test_importing_fedlora_takes_less_than_half_a_second() -> None:
    code = (
        "import time\nstart = time.process_time()\nimport fedlora\n"
        "print(time.process_time() - start)"
    )
    # Processor time, the best of three: another process must not fail this test.
    assert any(float(run_python(code)) < 0.5 for _ in range(3))


def test_the_public_names_are_sorted_and_there() -> None:
    assert sorted(fedlora.__all__) == fedlora.__all__
    assert all(hasattr(fedlora, name) for name in fedlora.__all__)
