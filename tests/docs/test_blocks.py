"""What the pages show is right as far as that can be told without running it; see also the runs."""

from __future__ import annotations

import ast
import shlex
import tomllib

import click
import pytest
import typer

from fedlora.cli.main import app
from fedlora.experiment import ExperimentConfig, find_experiment, parse_override
from tests.docs.blocks import LANGUAGES, PAGES, Block, blocks

ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [
    pytest.param(block, command, id=f"{block}-{command[8:40]}")
    for block in ALL
    if block.language == "bash"
    for command in block.commands()
]


def test_the_pages_have_blocks_of_known_languages() -> None:
    assert len(COMMANDS) > 60
    assert {block.language for block in ALL} <= LANGUAGES


@pytest.mark.parametrize(("block", "command"), COMMANDS)
def test_a_command_is_one_that_fedlora_has(block: Block, command: str) -> None:
    """Its name, its options and its arguments; values of --set are read as an experiment's keys."""
    words = shlex.split(command, comments=True)[1:]
    words = [word for word in words if word != "…"]
    found: click.Command = typer.main.get_command(app)
    context = click.Context(found, info_name="fedlora")
    while isinstance(found, click.Group):
        name = words.pop(0)
        inner = found.get_command(context, name)
        assert inner is not None, f"{block}: fedlora has no command {name!r}"
        found, context = inner, click.Context(inner, info_name=name, parent=context)
    context.resilient_parsing = True  # nothing is asked for that an environment variable gives
    parser = found.make_parser(context)
    values, rest, _ = parser.parse_args(args=list(words))
    places = [p for p in found.params if isinstance(p, click.Argument)]
    many = any(place.nargs == -1 for place in places)
    assert not rest or many, f"{block}: {found.name} takes no more arguments, found {rest}"
    overrides = dict(parse_override(text) for text in values.get("overrides") or ())
    named = values.get("experiment")
    if overrides and isinstance(named, str) and not named.endswith(".toml"):
        overrides.pop("data.clients", None)
        ExperimentConfig.from_toml(find_experiment(named), overrides)


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=str)
def test_python_can_be_read(block: Block) -> None:
    ast.parse(block.text if not block.text.startswith("    ") else f"{{\n{block.text}}}")


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "toml"], ids=str)
def test_an_experiment_has_known_keys(block: Block) -> None:
    table = tomllib.loads(block.text)
    if "base" not in table:  # a part of one
        whole = tomllib.loads(find_experiment("watch").read_text())
        for name, part in table.items():
            whole[name] = {**whole.get(name, {}), **part}
        table = whole
    ExperimentConfig.from_table(table)
