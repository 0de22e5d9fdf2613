"""Intervals around shares and means, all at 95 %."""

import numpy as np
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)  # percentiles between which draws are kept


def wilson(successes, n):
    """Wilson score interval of a share: (share, low, high); NaN where n is 0."""
    if n == 0:
        return (float("nan"),) * 3
    low, high = proportion_confint(successes, n, alpha=1 - LEVEL, method="wilson")
    share = successes / n
    return share, min(share, float(low)), max(share, float(high))  # rounding may leave 1 - 1e-16 beside 1


def bootstrap(values, seed, draws=2000):
    """Percentile bootstrap of the mean over the first axis.

    values: (n, ...) array, one row per independent unit. Returns three arrays of shape (...): mean, low, high.
    """
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(draws, len(values)))
    means = np.stack([values[p].mean(0) for p in picks])
    low, high = np.percentile(means, TAILS, axis=0)
    return values.mean(0), low, high
