"""The `fedlora` command: its subcommands, and how errors become one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fedlora import __version__
from fedlora.cli import (
    adapters,
    budget,
    compare,
    data,
    device,
    export,
    federation,
    models,
    ota,
    privacy,
    report,
    simulate,
    web,
)
from fedlora.cli import agent as _agent  # noqa: F401 - adds commands to device
from fedlora.cli import federation_hosts as _hosts  # noqa: F401 - adds commands to federation
from fedlora.cli import stages as _stages  # noqa: F401 - adds commands to ota
from fedlora.errors import FedloraError, MissingExtraError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Federated on-device personalization: share low-rank adapters, never data or full models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(simulate.simulate)
app.command()(compare.compare)
app.command()(report.report)
app.command()(adapters.inspect)
app.command()(adapters.convert)
app.command()(adapters.combine)
app.command()(budget.budget)
app.command()(export.export)
app.command()(web.web)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(device.app, name="device")
app.add_typer(ota.app, name="ota")
app.add_typer(federation.app, name="federation")
app.add_typer(privacy.app, name="privacy")

# Which extra brings a package that fedlora imports only where it is needed.
_EXTRAS = {
    "cryptography": "server",
    "dp_accounting": "privacy",
    "flwr": "sim",
    "gguf": "text",
    "matplotlib": "plots",
    "onnx": "export",
    "onnxruntime": "device",
    "ray": "ray",
    "securesystemslib": "ota",
    "tensorboardX": "tracking",
    "tokenizers": "text",
    "tomli_w": "sim",
    "torch": "train",
    "transformers": "text",
    "tuf": "ota",
}


def main() -> None:
    """Run the command line; the entry point of the `fedlora` script."""
    try:
        app()
    except FedloraError as error:
        _stop(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        missing = MissingExtraError(f"this command (it imports {package})", _EXTRAS[package])
        _stop(str(missing), missing.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _stop(f"{place}{error.strerror or error}", 1)
    except SystemExit as stop:
        if stop.code == 130:  # typer's silent end of a KeyboardInterrupt
            _stop("interrupted", 130)
        raise


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


def _stop(text: str, code: int) -> None:
    one_line = " ".join(text.split())
    print(f"fedlora: {one_line}", file=sys.stderr)
    sys.exit(code)
