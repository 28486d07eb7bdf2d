"""Whether the default strategy is worse than another one, beyond what chance explains. Pure.

In each round every strategy carries the same requests, so strategies are compared round by round, as ratios. The
default counts as worse where the interval of its ratio to another strategy lies wholly on the wrong side of 1. The
intervals of all comparisons of a run hold together with CONFIDENCE (Bonferroni): where strategies are equal, one run in
twenty says otherwise. Noise is estimated for a pool from all its pairs together, since a few rounds of one pair say
little of it."""

import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95
FEWEST_ROUNDS = 2


@dataclass(frozen=True)
class Compared:
    """The default's figure as a multiple of another strategy's, and the interval in which the true one lies."""

    pool: str
    other: str
    figure: str
    ratio: float
    low: float
    high: float

    def is_worse(self, more_is_better):
        return self.high < 1.0 if more_is_better else self.low > 1.0

    def __str__(self):
        return f"{self.pool}: {self.figure} {self.ratio:.2f} × {self.other}'s ({self.low:.2f} to {self.high:.2f})"


def student_t(probability, freedom):
    """Quantile of Student's t (Abramowitz and Stegun, 26.7.5); within 1 % from eight degrees of freedom on."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def compare(pool, figure, results, default, comparisons):
    """`results` are the figure's values by strategy and round; `comparisons` are those of the whole run."""
    logs = {
        other: [math.log(ours / theirs) for ours, theirs in zip(results[default], values, strict=True)]
        for other, values in results.items()
        if other != default
    }
    rounds = len(results[default])
    if rounds < FEWEST_ROUNDS:
        raise ValueError(f"{FEWEST_ROUNDS} rounds are needed to tell noise")
    freedom = len(logs) * (rounds - 1)
    noise = math.sqrt(sum(statistics.variance(values) for values in logs.values()) / len(logs))
    # Two-sided: half of what may go wrong is on either side.
    reach = student_t(1 - (1 - CONFIDENCE) / comparisons / 2, freedom) * noise / math.sqrt(rounds)
    found = []
    for other, values in logs.items():
        middle = statistics.fmean(values)
        ends = (math.exp(middle + side * reach) for side in (0, -1, 1))
        found.append(Compared(pool, other, figure, *ends))
    return found
