"""The wheel, installed where there is no clone, and the editable install, which is the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fedlora", "clients", "server", "simulations",
           "tests")  # fmt: skip
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
PACKAGE_DATA = {
    "py.typed",
    *(f"bases/files/tiny-chat/{name}" for name in (
        "LICENSE.chitchat", "README.md", "card.json", "config.json", "model.safetensors",
        "tokenizer.json",
    )),
    *(f"bases/files/watch-cnn/{name}" for name in (
        "LICENSE.seglearn", "README.md", "card.json", "config.json", "model.safetensors",
    )),
    *(f"data/files/{name}" for name in (
        "LICENSE.chitchat", "LICENSE.seglearn", "chitchat_117x1000.jsonl.gz",
        "chitchat_12x400.jsonl.gz", "watch.npz",
    )),
}  # fmt: skip
APP = {
    "pyproject.toml",
    *(f"simulations/{path.name}" for path in (PROJECT / "simulations").glob("*.toml")),
}
WHERE = """
import json, sys
import fedlora
from fedlora.experiment import app_root
print(json.dumps([fedlora.__file__, str(app_root()), sys.path]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project without what git does not keep, so that no build touches the clone."""
    folder = tmp_path_factory.mktemp("project") / "fedlora-source"
    folder.mkdir()
    for name in SOURCES:
        if (PROJECT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "runs", ".*_cache")
            shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(PROJECT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source)
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_data_and_the_app_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    modules = {path.relative_to(source).as_posix() for path in source.glob("fedlora/**/*.py")}
    rest = {name for name in names if ".dist-info/" not in name} - modules
    assert modules <= set(names)
    files = [*source.glob("clients/**/*"), *source.glob("server/**/*")]
    found = {path.relative_to(source).as_posix() for path in files if path.is_file()}
    # The browsers' runtime, 14 MB, is fetched by who wants the page from a wheel: docs/web.md.
    app = APP | {name for name in found if not name.startswith("clients/web/vendor/")}
    assert any(name.startswith("clients/web/vendor/") for name in found)
    assert {"clients/app.py", "clients/onnx_app.py", "clients/web/index.html"} <= app
    assert rest == {f"fedlora/{name}" for name in PACKAGE_DATA} | {
        f"fedlora/_app/{name}" for name in app
    }


def test_the_installed_wheel_simulates_from_an_empty_folder(wheel, tmp_path):
    python = _environment(tmp_path / "venv")
    _install(python, wheel)
    here = tmp_path / "empty"
    here.mkdir()
    module, app_root, path = json.loads(_run(python, "-c", WHERE, cwd=here))
    assert Path(module).is_relative_to(tmp_path / "venv")
    assert Path(app_root) == Path(module).parent / "_app"
    assert str(PROJECT) not in path

    sets = [f"--set={key}" for key in (
        "federation.rounds=1", "federation.local_steps=1", "personalization.steps=1",
    )]  # fmt: skip
    script = python.with_name("fedlora")
    summary = json.loads(_run(script, "simulate", "watch", "--json", *sets, cwd=here))
    assert (summary["name"], summary["rounds"], summary["clients"]) == ("watch", 1, 10)
    assert summary == json.loads((here / "runs" / "watch" / "summary.json").read_text())
    assert "tiny-chat" in _run(script, "models", "list", cwd=here)


def test_the_app_of_an_editable_install_is_the_clone(source, tmp_path):
    python = _environment(tmp_path / "venv")
    _install(python, "--no-build-isolation", "--editable", source)
    module, app_root, _ = json.loads(_run(python, "-c", WHERE, cwd=tmp_path))
    assert Path(module) == source / "fedlora" / "__init__.py"
    assert Path(app_root) == source


def _environment(folder: Path) -> Path:
    """Make a virtual environment and return its Python.

    It finds this environment's packages through a .pth file: nothing is downloaded. Python does not
    follow the .pth files in a folder that is added so, which is how an editable install would come
    along.
    """
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / SCRIPTS / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(_run(python, "-c", ask).strip())
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (packages / "third_party.pth").write_text("\n".join(ours) + "\n")
    return python


def _install(python: Path, *what: str | Path) -> None:
    """Install with this environment's pip, which needs none in the other."""
    _run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install",
         "--no-deps", "--no-index", *what)  # fmt: skip


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Return stdout; fail with everything that was said. PYTHONPATH would bring in the clone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
