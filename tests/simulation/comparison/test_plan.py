"""What is run: how methods and grids are written, in which order keys win, and what is refused."""

import json

import pytest

from fedlora.errors import ConfigError
from fedlora.simulation.comparison.plan import (
    Plan,
    Tuning,
    grid_points,
    parse_grid,
    parse_methods,
)
from tests.simulation.small import config

BOTH = parse_methods("fedit,ffa-lora")


def plan(**changes) -> Plan:
    values = {"experiment": config().to_table(), "methods": BOTH, "seeds": (0, 1)}
    return Plan(**{**values, "against": "fedit", **changes})


def test_a_method_may_have_options_an_optimizer_and_keys():
    assert parse_methods("fedit, flora:rank=16:energy=0.9+adam+robust=median+lora.rank=2") == {
        "fedit": {"federation.method": "fedit"},
        "flora:rank=16:energy=0.9+adam+robust=median+lora.rank=2": {
            "federation.method": "flora",
            "federation.method_options.rank": 16,
            "federation.method_options.energy": 0.9,
            "federation.server_optimizer": "adam",
            "federation.robust": "median",
            "lora.rank": 2,
        },
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lora.rank=2,8,32", [2, 8, 32]),
        ("federation.learning_rate=1e-3", [1e-3]),
        ("data.partition=iid,dirichlet:0.3", ["iid", "dirichlet:0.3"]),
        ("federation.client_ranks=[2, 4],[8]", [[2, 4], [8]]),
        ("engine.prefix_cache=true,false", [True, False]),
    ],
)
def test_a_grid_is_read_as_toml_or_as_text(text, found):
    assert parse_grid(text) == (text.partition("=")[0], found)


def test_a_grid_is_the_product_of_its_keys_or_points_as_they_are_given():
    assert grid_points({"a": [1, 2], "b": ["x", "y"]}) == (
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    )  # fmt: skip
    coupled = [{"lora.rank": 2, "lora.lora_alpha": 4}, {"lora.rank": 8, "lora.lora_alpha": 16}]
    assert grid_points(coupled) == tuple(coupled)
    assert grid_points({}) == ({},)


def test_a_method_wins_over_settings_and_the_seed_over_all():
    found = plan(
        settings={"federation.learning_rate": 0.5, "federation.rounds": 7, "seed": 9},
        methods={"slow": {"federation.learning_rate": 0.01}, "fedit": {}},
        points=({"lora.rank": 1},),
    ).config("slow", {"lora.rank": 1}, seed=4)
    assert found.federation.train.learning_rate == 0.01
    assert (found.federation.rounds, found.lora.rank, found.seed) == (7, 1, 4)


def test_options_of_the_experiments_own_method_are_not_given_to_another():
    table = config().to_table()
    table["federation"]["method_options"] = {"no_such": 1}
    mine = plan(experiment=table)
    assert mine.config("ffa-lora", {}, seed=0).federation.method_options == {}
    with pytest.raises(ConfigError, match=r"method 'fedit': federation: .*no_such"):
        mine.config("fedit", {}, seed=0)


def test_a_plan_survives_json():
    mine = plan(
        points=grid_points({"lora.rank": [1, 2]}),
        settings={"base.num_classes": None, "federation.client_ranks": [1, 1]},
        tuning=Tuning(seed=77),
    )
    assert Plan.from_table(json.loads(json.dumps(mine.to_table()))) == mine


# What is changed in a plan that is well, and what the error says.
REFUSED = {
    "one seed": ({"seeds": (0,)}, "--seeds: expected at least 2 for an interval, found 1"),
    "a seed twice": ({"seeds": (1, 1)}, "--seeds: expected different ones"),
    "no methods": ({"methods": {}}, "expected at least one method"),
    "another reference": ({"against": "fedot"}, "--against fedot: .*did you mean 'fedit'"),
    "seed in the grid": ({"points": ({"seed": 1},)}, "--grid seed: .*use --seeds"),
    "method in the grid": (
        {"points": ({"federation.method": "fedit"},)}, "federation.method: .*use --methods",
    ),
    "a key in a method and in the grid": (
        {"methods": {"fedit": {"lora.rank": 2}}, "points": ({"lora.rank": 1},)},
        "method 'fedit' sets lora.rank, which --grid sweeps",
    ),
    "a learning rate tuned and swept": (
        {"points": ({"federation.learning_rate": 1.0},), "tuning": Tuning(seed=9)},
        "--tune finds federation.learning_rate, and --grid sweeps it",
    ),
    "tuned on a reported seed": ({"tuning": Tuning(seed=1)}, "expected a seed that is not report"),
    "no personal adapter to tune on": (
        {"tuning": Tuning(seed=9, on="personal"), "only_global": True}, "there is no personal",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        plan(**changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fedit,", "found ''"),
        ("fedit,fedit", "'fedit' is there twice"),
        ("fedit:rank", "expected key=value, found 'rank'"),
        ("fedit+", "found 'fedit\\+'"),
    ],
)
def test_a_bad_list_of_methods_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_methods(text)


@pytest.mark.parametrize("text", ["lora.rank", "lora.rank=", "=2", "data.partition=iid,,x"])
def test_a_bad_grid_is_refused(text):
    with pytest.raises(ConfigError, match="--grid"):
        parse_grid(text)


def test_a_point_twice_is_refused():
    with pytest.raises(ConfigError, match=r"lora\.rank=2 is there twice"):
        grid_points({"lora.rank": [2, 2]})


def test_too_few_learning_rates_are_refused():
    with pytest.raises(ConfigError, match="at least 5 learning rates, found 4"):
        Tuning(seed=0, values=4)
