"""`megafork analyze temperatures`: its table by hand, and its settings."""

from __future__ import annotations

import math
import statistics

import pytest

from megafork.analysis.temperatures import pairs_of, table
from megafork.config.load import load_config
from megafork.config.rollouts import TemperaturesConfig
from megafork.errors import UserError
from megafork.evaluation.estimates import Judged
from megafork.rollout.sampling import TwoTemperatures

NEEDED = ["model.path=m", "reward.verifier=megafork.verifiers.countdown:verify"]


def scored(*accuracies: float, length: int = 10, truncated: bool = False) -> list[tuple]:
    return [(accuracy, None, length, truncated) for accuracy in accuracies]


def test_the_table_by_hand():
    base = Judged.of(scored(1, 0, 0, 0, 1, 1), 2)
    hot = [*scored(0, 0), *scored(0, 1, length=20, truncated=True), *scored(0, 1)]
    pairs = TwoTemperatures(0.5), TwoTemperatures(0.5, above=2.0)
    first, second = table(list(zip(pairs, (base, Judged.of(hot, 2)), strict=True)))
    assert (first["above"], first["below"], second["above"]) == (1.0, 1.0, 2.0)
    assert (first["accuracy"], first["change"], first["change_high"]) == (0.5, 0.0, 0.0)
    assert second["accuracy"] == pytest.approx(1 / 3)
    assert (second["length"], second["truncated"]) == pytest.approx((40 / 3, 1 / 3))
    # Problem by problem -0.5, 0.5, -0.5; the 97.5% point of Student's t with 2 degrees is 4.302653.
    differences = [-0.5, 0.5, -0.5]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)
    assert second["change"] == pytest.approx(-1 / 6)
    assert second["change_low"] == pytest.approx(max(-1.0, -1 / 6 - half))
    assert second["change_high"] == pytest.approx(min(1.0, -1 / 6 + half))


def test_every_pair_once_and_the_baseline_first():
    sweep = ["sweep.threshold=0.3", "sweep.above=[0.5, 1.0, 2.0]", "sweep.below=[1.0, 0.0]"]
    config = load_config(TemperaturesConfig, None, NEEDED + sweep)
    pairs = [(p.threshold, p.above, p.below) for p in pairs_of(config)]
    assert pairs == [(0.3, 1, 1), (0.3, 0.5, 1), (0.3, 2, 1), (0.3, 1, 0)]


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("rollout.temperature=0.7", r"rollout\.temperature=0\.7 would change"),
        ("rollout.top_p=0.9", r"rollout\.top_p=0\.9 would change"),
        ("rollout.top_k=5", r"rollout\.top_k=5 would change"),
        ("rollout.url=http://127.0.0.1:9", "knows one temperature"),
        ("sweep.above=[-1.0]", r"sweep\.above.*greater than or equal to 0"),
        ("sweep.threshold=p80", r"sweep\.threshold='p80'"),
        ("sweep.treshold=0.3", r"did you mean sweep\.threshold"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override, cause):
    with pytest.raises(UserError, match=cause):
        load_config(TemperaturesConfig, None, [*NEEDED, override])
