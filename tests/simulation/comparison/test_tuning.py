"""The ladder, its extension at an edge, and what a diverged learning rate counts."""

from fedlora.simulation.comparison.plan import Tuning
from fedlora.simulation.comparison.runs import Result, Score
from fedlora.simulation.comparison.tuning import Tuned, ladder, tune

TUNING = Tuning(seed=9, factor=2.0, extra=3)


def tuned(score, *, higher_is_better: bool = True) -> Tuned:
    """Tune where a run's score, or (score, loss), or None for diverged, follows from its rate."""

    def run(rate: float) -> Result:
        found = score(rate)
        if found is None:
            return Result("diverged", reason="NaN")
        mean, loss = found if isinstance(found, tuple) else (found, 1.0)
        scores = {"global": Score(mean, loss)}
        return Result("done", scores=scores, higher_is_better=higher_is_better)

    return tune("fedit", 0, 0.1, TUNING, run)


def rates(found: Tuned) -> list[float]:
    return [one.learning_rate for one in found.tried]


def test_the_ladder_is_geometric_around_the_experiments_own():
    assert ladder(0.1, TUNING) == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert ladder(0.1, Tuning(seed=1)) == [0.01, 0.0316, 0.1, 0.316, 1.0]


def test_the_best_inside_ends_it():
    found = tuned(lambda rate: -abs(rate - 0.2))
    assert (found.learning_rate, found.at_edge) == (0.2, False)
    assert rates(found) == [0.025, 0.05, 0.1, 0.2, 0.4]


def test_a_lower_metric_may_be_better():
    assert tuned(lambda rate: abs(rate - 0.05), higher_is_better=False).learning_rate == 0.05


def test_the_ladder_goes_on_at_its_edge_until_the_best_is_inside():
    found = tuned(lambda rate: -abs(rate - 0.8))
    assert (found.learning_rate, found.at_edge) == (0.8, False)
    assert rates(found) == [0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    down = tuned(lambda rate: -rate - 0.01 / rate**2)  # best at 0.271...
    assert down.learning_rate == 0.2


def test_it_goes_on_within_its_budget_and_says_that_it_is_at_the_edge():
    found = tuned(lambda rate: -rate)
    assert (found.learning_rate, found.at_edge) == (0.00313, True)
    assert len(found.tried) == TUNING.values + TUNING.extra


def test_equal_metrics_are_told_apart_by_the_loss():
    assert tuned(lambda rate: (1.0, abs(rate - 0.05))).learning_rate == 0.05


def test_a_diverged_learning_rate_is_the_worst():
    found = tuned(lambda rate: rate if rate <= 0.1 else None)
    assert (found.learning_rate, found.at_edge) == (0.1, False)
    assert [one.score for one in found.tried] == [0.025, 0.05, 0.1, None, None]
    assert found.tried[-1].reason == "NaN"


def test_where_all_diverge_lower_ones_are_tried():
    found = tuned(lambda rate: rate if rate < 0.01 else None)
    assert (found.learning_rate, found.at_edge) == (0.00625, False)
    assert rates(found) == [0.00313, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]
    hopeless = tuned(lambda rate: None)
    assert (hopeless.learning_rate, hopeless.at_edge) == (0.00313, True)
