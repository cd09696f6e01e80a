"""Metrics of an evaluation against enumeration of all subsets, and intervals against bootstrap."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import mpmath
import numpy
import pytest

from megafork.answers.comparison import canonical_answer
from megafork.config import RewardConfig
from megafork.evaluation import estimates
from megafork.evaluation.estimates import (
    Judged,
    majority_at_k,
    mean_margin,
    pass_at_k,
    share_intervals,
    vote,
)
from megafork.verifiers.names import load_verifier
from tools.benchmark_intervals import (
    ACCURACIES,
    CONCENTRATIONS,
    PROBLEMS,
    SAMPLES,
    covers,
    draw,
    students,
)

ROUNDING = 1e-12  # sums of a few hundred float64 products


def subsets(n, k):
    return list(itertools.combinations(range(n), k))


# ------------------------------------------------------------------------------- pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for right in range(n + 1):
            scores = [1] * right + [0] * (n - right)
            for k in range(1, n + 1):
                chosen = subsets(n, k)
                share = sum(any(scores[i] for i in subset) for subset in chosen) / len(chosen)
                assert pass_at_k(n, right, k) == pytest.approx(share, abs=ROUNDING)


@pytest.mark.parametrize(("n", "right", "k"), [(5000, 1, 1), (5000, 3, 2500), (4096, 40, 64)])
def test_pass_at_k_of_thousands_is_exact(n, right, k):
    exact = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
    assert pass_at_k(n, right, k) == pytest.approx(float(exact), rel=1e-11)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_what_cannot_be(n, right, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, right, k)


# -------------------------------------------------------------------------------- maj@k


def majority_by_enumeration(answers, accuracies, k):
    """Every subset's winners, tied ones with equal shares; a winner scores as one who gave it."""
    scores = []
    for subset in subsets(len(answers), k):
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        of = {a: [s for b, s in zip(answers, accuracies, strict=True) if a == b] for a in winners}
        scores.append(numpy.mean([numpy.mean(of[a]) for a in winners]) if winners else 0.0)
    return numpy.mean(scores)


CASES = {
    "two answers": (list("aabbb"), [1, 1, 0, 0, 0]),
    "ties": (list("aabbccd"), [1, 1, 0, 0, 0, 0, 0]),
    "no votes": (["a", None, None, "b", "b", None], [1, 0, 0, 0, 0, 0]),
    "nobody votes": ([None] * 4, [0, 1, 0, 0]),
    "all alone": (list("abcdefg"), [0, 0, 1, 0, 1, 0, 0]),
    "an answer both right and wrong": (list("aaabbc"), [1, 0, 1, 1, 0, 0]),
    "one": (["a"], [1]),
}


@pytest.mark.parametrize("case", CASES)
def test_majority_is_that_of_all_subsets(case):
    answers, accuracies = CASES[case]
    for k in range(1, len(answers) + 1):
        found = majority_at_k(answers, accuracies, k)
        expected = majority_by_enumeration(answers, accuracies, k)
        assert found.value == pytest.approx(expected, abs=ROUNDING)
        assert found.error == 0


def test_majority_of_random_votes_is_that_of_all_subsets():
    generator = random.Random(0)
    for _ in range(30):
        n = generator.randint(2, 9)
        answers = [generator.choice(["a", "b", "c", "d", None]) for _ in range(n)]
        accuracies = [float(generator.random() < 0.5) for _ in range(n)]
        k = generator.randint(1, n)
        expected = majority_by_enumeration(answers, accuracies, k)
        assert majority_at_k(answers, accuracies, k).value == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("k", [1, 3, 16, 60])
def test_many_samples_are_drawn_with_a_stated_error(monkeypatch, k):
    """The exact path is checked above; the drawn one has to agree with it within its error."""
    generator = random.Random(k)
    answers = [generator.choices(["a", "b", "c", None], [5, 4, 2, 3])[0] for _ in range(100)]
    accuracies = [float(answer == "a") for answer in answers]
    exact = majority_at_k(answers, accuracies, k)
    monkeypatch.setattr(estimates, "EXACT_SAMPLES", 0)
    drawn = majority_at_k(answers, accuracies, k)
    assert exact.error == 0 < drawn.error < 0.01
    assert abs(drawn.value - exact.value) < 4 * drawn.error
    assert drawn == majority_at_k(answers, accuracies, k)  # seeded


def test_the_exact_majority_holds_at_its_limit():
    """k = 1 is avg@1 and k = n one vote; 127 of 128 is the mean over the one left out."""
    answers = ["a"] * 64 + ["b"] * 63 + ["c"]
    accuracies = [0.0] * 64 + [1.0] * 63 + [0.0]
    assert majority_at_k(answers, accuracies, 1).value == pytest.approx(63 / 128, abs=ROUNDING)
    assert majority_at_k(answers, accuracies, 128).value == 0
    # Without one of the 64 the two are tied; else "a" wins.
    expected = 64 / 128 * 0.5
    assert majority_at_k(answers, accuracies, 127).value == pytest.approx(expected, abs=ROUNDING)


# --------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("degrees", "expected"),  # printed tables, 97.5%
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (29, 2.0452), (30, 2.0423), (99, 1.9842)],
)
def test_t_quantiles_are_those_of_the_tables(degrees, expected):
    assert mean_margin(degrees + 1, 1.0) == pytest.approx(expected, abs=1e-4)


def problems_of(generator, count, samples):
    """Problems of different difficulty, with samples that are right by chance."""
    chances = generator.beta(0.6, 0.9, size=count)
    right = [x for chance in chances for x in generator.random(samples) < chance]
    return Judged.of(((float(x), None, 1, False) for x in right), samples)


@pytest.mark.parametrize("metric", [estimates.avg_at_k, lambda p: estimates.passes(p, 4)])
def test_intervals_are_those_of_a_bootstrap_over_problems(metric):
    generator = numpy.random.default_rng(0)
    problems = problems_of(generator, 60, 8)
    found = metric(problems)
    columns = zip(*vars(problems).values(), strict=True)
    values = numpy.array([metric(Judged(*(c[None] for c in each))).value for each in columns])
    means = generator.choice(values, (20_000, len(values))).mean(axis=1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    # t is 2% wider than a bootstrap of 60, whose ends are off by 1% of the width in 20,000 draws.
    width = high - low
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.06 * width)
    assert found.high == pytest.approx(high, abs=0.06 * width)
    assert found.standard_error == pytest.approx(means.std(), rel=0.03)


REPETITIONS = 2000
FOUR_ERRORS = 4 * math.sqrt(0.93 * 0.07 / REPETITIONS)  # of the simulation
CELLS = [
    # problems, samples, accuracy, concentration
    (30, 1, 0.01, 1.0),
    (30, 4, 0.01, 1.0),
    (30, 64, 0.01, math.inf),
    (30, 16, 0.05, 0.3),
    (30, 4, 0.4, 1.5),
    (30, 64, 0.99, 1.0),
    (50, 1, 0.01, 1.0),
    (100, 4, 0.9, 4.0),
    (100, 64, 0.25, 1.0),
    (100, 1, 0.5, 1.0),
    (500, 64, 0.02, 1.0),
    (500, 16, 0.05, 1.5),
    (500, 1, 0.95, 1.0),
]


def coverage(cell, seed=0):
    problems, samples, accuracy, _ = cell
    generator = numpy.random.default_rng([seed, problems, samples])
    return covers(draw(generator, REPETITIONS, *cell), accuracy).mean()


@pytest.mark.parametrize("cell", CELLS)
def test_intervals_hold_the_truth_as_often_as_they_say(cell):
    """New problems, whose difficulty is drawn from a Beta distribution of known mean."""
    problems, _, accuracy, _ = cell
    found = coverage(cell)
    assert found > 0.93 - FOUR_ERRORS
    if problems * accuracy * (1 - accuracy) >= 10:
        assert found < 0.97 + FOUR_ERRORS


def test_students_interval_would_not_have_held_the_rare():
    """What the interval was: at 1% accuracy 30 problems often have no right sample, or one."""
    generator = numpy.random.default_rng(0)
    shares = draw(generator, REPETITIONS, 30, 64, 0.01, 1.0)
    low, high = students(shares)
    assert numpy.mean((low <= 0.01) & (high >= 0.01)) < 0.8 < 0.93 < covers(shares, 0.01).mean()


@pytest.mark.slow
@pytest.mark.parametrize("problems", PROBLEMS)
def test_intervals_hold_the_truth_over_the_whole_table(problems):
    """Of 200 shapes a cell some would be 4 errors off by chance alone: once drawn anew, they have
    to hold."""
    wrong = []
    for cell in itertools.product([problems], SAMPLES, ACCURACIES, CONCENTRATIONS):
        highest = 0.97 if problems * cell[2] * (1 - cell[2]) >= 10 else 1.0
        found = coverage(cell)
        if not 0.93 <= found <= highest:
            found = (found + coverage(cell, seed=1) + coverage(cell, seed=2)) / 3
            if not 0.93 - FOUR_ERRORS / 3 <= found <= highest + FOUR_ERRORS / 3:
                wrong.append((cell, found))
    assert wrong == []


def test_an_interval_holds_the_mean():
    generator = numpy.random.default_rng(3)
    for problems, samples, accuracy in ((2, 4, 0.5), (30, 8, 0.02), (60, 4, 0.97), (200, 16, 0.3)):
        shares = draw(generator, 4, problems, samples, accuracy, 1.0)
        low, high = share_intervals(shares)
        means = shares.mean(1)
        assert ((low >= 0) & (low <= means) & (means <= high) & (high <= 1)).all()


@pytest.mark.parametrize(("count", "right"), [(30, 1), (30, 29), (40, 3), (60, 8), (500, 5)])
def test_the_bounds_leave_the_tails_that_mpmath_integrates(count, right):
    """Up to eight of the rarer kind and one sample each: Clopper and Pearson's definition."""
    [low], [high] = share_intervals(numpy.array([[1.0] * right + [0.0] * (count - right)]))
    above = mpmath.betainc(right, count - right + 1, 0, low, regularized=True)
    below = mpmath.betainc(right + 1, count - right, high, 1, regularized=True)
    assert float(above) == pytest.approx(0.025, abs=1e-11)
    assert float(below) == pytest.approx(0.025, abs=1e-11)


def test_the_sampling_error_is_that_of_drawing_the_samples_anew():
    generator = numpy.random.default_rng(2)
    chances = generator.beta(0.6, 0.9, size=40)
    drawn = generator.random((4000, 40, 8)) < chances[:, None]
    truth = drawn.mean(axis=(1, 2)).std()
    errors = [estimates.sampling_error(sample.astype(float)) for sample in drawn[:400]]
    assert numpy.mean(errors) == pytest.approx(truth, rel=0.05)
    assert estimates.sampling_error(numpy.array([[1.0], [0.0]])) is None


def test_where_all_problems_agree_the_interval_still_has_a_width():
    """Clopper-Pearson by its definition: at its end, 2.5% is left for what was seen."""
    right = estimates.estimate([1.0] * 30)
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low**30 == pytest.approx(0.025)
    wrong = estimates.estimate([0.0] * 30)
    assert (wrong.value, wrong.low) == (0.0, 0.0)
    assert (1 - wrong.high) ** 30 == pytest.approx(0.025)


def test_an_interval_by_hand():
    """Mean 0.5, variance 0.26 / 2, t of two degrees 4.3027."""
    found = estimates.estimate([0.2, 0.4, 0.9], is_share=False)
    assert found.standard_error == pytest.approx((0.13 / 3) ** 0.5)
    assert found.low == pytest.approx(0.5 - 4.3027 * (0.13 / 3) ** 0.5, abs=1e-4)
    assert found.high == pytest.approx(0.5 + 4.3027 * (0.13 / 3) ** 0.5, abs=1e-4)


def test_one_problem_has_no_interval():
    found = estimates.estimate([0.5])
    assert (found.value, found.low, found.high, found.standard_error) == (0.5, None, None, None)


def test_lengths_and_truncation():
    samples = [(0, None, 10, False), (0, None, 30, True), (0, None, 60, True), (0, None, 100, True)]
    problems = Judged.of(samples, 2)
    length = estimates.mean_length(problems)
    assert length.value == 50
    assert length.high > 100  # 20 and 80, two problems: 50 +- 12.7 * 30, not cut to 1
    assert estimates.truncated_fraction(problems).value == 0.75


# ------------------------------------------------------------------------------- votes


@pytest.mark.parametrize(
    ("how", "response", "truncated", "answer"),
    [
        ("boxed", r"x \boxed{1} y", True, "1"),
        ("boxed", r"so \boxed{\frac{1}{2}}, then \boxed{ 4 2 }.", False, "=4 2"),
        ("boxed", r"\boxed{1} and then \boxed{2", False, None),
        ("boxed", "1", False, None),
        ("text", r" x \boxed{1} ", False, r"x \boxed{1}"),
        ("text", "  ", False, None),
        ("auto", r"x \boxed{1} y", False, "1"),
        ("auto", " 6*4=24. ", False, "6*4=24."),
        ("auto", "6*4=24.", True, None),
    ],
)
def test_what_votes(how, response, truncated, answer):
    assert vote(response, how, RewardConfig(verifier="maths"), truncated=truncated) == answer


@pytest.mark.parametrize("answer_from", [None, ["boxed", "answer_line"]])
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{3}", 1.0),
        (r"\boxed{2}, no: \boxed{ 3 }.", 1.0),
        (r"\boxed{3}. Checking: \boxed{", 0.0),
        (r"\boxed{3}. Checking: \boxed{2", 0.0),
        (r"\boxed{3} and \boxed{}", 0.0),
        (r"\boxed 3", 0.0),
    ],
)
def test_reward_and_vote_take_the_same_answer(response, reward, answer_from):
    """A response votes for the right answer where the verifier says that it is right, only."""
    config = RewardConfig(verifier="maths", answer_from=answer_from)
    assert load_verifier("maths", config.places)("p", response, "3") == reward
    voted = vote(response, "boxed", config, truncated=False)
    assert voted == (canonical_answer("3") if reward else None)


def test_other_verifiers_votes_are_counted_by_their_spelling():
    reward = RewardConfig(verifier="exact", answer_from=["hash", "last_number"])
    responses = ["so\n#### 1 / 2", "it is 0.5", "#### 0.5"]
    votes = [vote(response, "auto", reward, truncated=False) for response in responses]
    assert votes == ["1/2", "0.5", "0.5"]


@pytest.mark.parametrize(
    "alike",
    [
        ["1/2", r"\frac{1}{2}", "0.5", r"\dfrac12", "½", "x=0.50"],
        ["50", r"50\%", r"50\text{ cm}", r"\$50", r"50^\circ"],
        ["1,2", r"\{2,1\}", r"2\text{ or }1", "x=1, x=2"],
        ["(1,2)", "1<x<2", r"\left(1,\,2\right)"],
        ["[1,2]", r"1\le x\le2", r"x\in[1,\frac42]"],
        [r"2\sqrt2", r"\sqrt8", r"\frac{4}{\sqrt2}"],
        ["4", r"\sqrt8\sqrt2", "2^2"],
        ["(x+1)^2", "x^2+2x+1"],
        ["x>5", r"(5,\infty)"],
        ["y=2x+1", "2x+1"],
    ],
)
def test_one_answer_has_one_vote_however_it_is_spelled(alike):
    """Not by judging pair by pair: 50% equals 50 and 0.5, which are two answers."""
    assert len({canonical_answer(text) for text in alike}) == 1


def test_different_answers_have_different_votes():
    texts = ["50", "0.5", "(1,2)", "1,2", "[1,2]", r"\sqrt2", "1.41421356237309504880", "x+1", "x"]
    texts += ["BACD", "BADC", "10:15", "2:3", "1011_2", "1011", r"\emptyset", "0", r"\int x", "5!!"]
    assert len({canonical_answer(text) for text in texts}) == len(texts)


def test_a_majority_of_spellings_wins():
    """Three of five are right, each spelled in its own way; two agree on a wrong one."""
    reward = RewardConfig(verifier="maths")
    boxes = [r"\frac12", "0.5", "1/2", "2", "2"]
    votes = [vote(f"\\boxed{{{box}}}", "auto", reward, truncated=False) for box in boxes]
    assert majority_at_k(votes, [1, 1, 1, 0, 0], 5).value == 1.0
