"""Coverage and width of the intervals of avg@n, by simulation, beside Student's t.

    OMP_NUM_THREADS=1 python tools/benchmark_intervals.py [--repetitions 4000] [--seed 0]

A problem's probability of being solved is drawn from a Beta distribution with the given mean and
a + b = `concentration` (inf: all problems are equally hard; 0.3: nearly all are solved always or
never), then k samples of each of n problems. Prints for each n, k and accuracy the least and the
largest coverage over the concentrations, and the mean widths at concentration 1.
"""

from __future__ import annotations

import argparse
import math

import numpy

from megafork.evaluation.estimates import mean_margin, share_intervals

PROBLEMS = (30, 60, 100, 200, 500)
SAMPLES = (1, 4, 16, 64)
ACCURACIES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
CONCENTRATIONS = (0.3, 1.0, 1.5, 4.0, math.inf)
WIDTHS_OF = 200
"""Repetitions whose widths are averaged"""


def draw(generator, repetitions, problems, samples, accuracy, concentration):
    """Shares of right samples [repetitions, problems]."""
    size = (repetitions, problems)
    if math.isinf(concentration):
        chances = numpy.full(size, accuracy)
    else:
        chances = generator.beta(accuracy * concentration, (1 - accuracy) * concentration, size)
    return generator.binomial(samples, chances) / samples


def covers(shares, truth):
    """Whether the interval of each row of `shares` [repetitions, problems] holds `truth`."""
    low, high = share_intervals(shares)
    return (low <= truth) & (truth <= high)


def students(shares):
    """(low, high) of each row, cut to 0..1; Clopper and Pearson's where all agree on 0 or 1."""
    count = shares.shape[1]
    mean = shares.mean(1)
    margin = mean_margin(count, 1.0) * shares.std(1, ddof=1) / math.sqrt(count)
    low, high = numpy.maximum(mean - margin, 0), numpy.minimum(mean + margin, 1)
    extreme = 0.025 ** (1 / count)
    return numpy.where(mean == 1, extreme, low), numpy.where(mean == 0, 1 - extreme, high)


def cell(generator, repetitions, problems, samples, accuracy):
    """Least and largest coverage, Student's least coverage, and both mean widths at a + b = 1."""
    ours, theirs, widths = [], [], (0.0, 0.0)
    for concentration in CONCENTRATIONS if samples > 1 else (1.0,):
        shares = draw(generator, repetitions, problems, samples, accuracy, concentration)
        ours.append(covers(shares, accuracy).mean())
        low, high = students(shares)
        theirs.append(((low <= accuracy) & (accuracy <= high)).mean())
        if concentration == 1.0:
            first, last = share_intervals(shares[:WIDTHS_OF])
            widths = float((last - first).mean()), float((high - low)[:WIDTHS_OF].mean())
    return min(ours), max(ours), min(theirs), *widths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = numpy.random.default_rng(arguments.seed)
    print("| n | k | accuracy | coverage | of t, least | width | of t |\n|" + " --- |" * 7)
    for problems in PROBLEMS:
        for samples in SAMPLES:
            for accuracy in ACCURACIES:
                least, most, of_t, width, width_t = cell(
                    generator, arguments.repetitions, problems, samples, accuracy
                )
                print(
                    f"| {problems} | {samples} | {accuracy:g} | {100 * least:.1f}-{100 * most:.1f} "
                    f"| {100 * of_t:.1f} | {100 * width:.1f} | {100 * width_t:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
