"""A model of effects for the grid of notebook 09: logistic regression that survives cells of 0 in n, causes ranked.

Two quantities, since cells without any emoji separate the data and ordinary coefficients then run off to infinity:
- *Drop in deviance* when a cause and all its interactions are left out. It stays finite under separation, so it needs
  no correction. It ranks the causes.
- *Effects in points of share*, from Firth's penalised fit (Firth 1993), which adds half a leverage to successes and
  failures of every cell (for one cell alone: one half to each), with errors robust to clusters, since a training's
  checkpoints hang together, or the model's own where those are larger: clusters without any emoji look as if nothing
  could vary. Delta method, t with (clusters - 1) degrees of freedom.
"""

import warnings

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import t

from lib import causes, intervals

CAUSES = ("habit", "end of turn", "tuning steps", "planted rate")


class Design:
    """Columns of the regression for rows with habit, end_of_turn, steps, planted. Built once from the grid's rows.

    Main effects: habit (against none, or the first there is), end of turn (tuned rows only: untuned there is none),
    every step count, the trait's planted rate (deviation from the linked traits' mean; 0 for controls). Interactions of
    habit and of planted rate with end of turn and with being tuned; of all three with the doublings of steps. Columns
    that the rows cannot tell from earlier ones are dropped.
    """

    def __init__(self, rows):
        self.habits = [h for h in reversed(causes.HABITS) if h in set(rows["habit"])]
        self.on = "linked" if "linked" in self.habits else self.habits[-1]
        self.steps = sorted(rows["steps"].unique())
        rates = rows.loc[rows["habit"] == "linked"].drop_duplicates(["organism", "trait"])["planted"]
        self.rates = np.sort(rates.dropna().to_numpy(float))
        self.mean = self.rates.mean() if len(self.rates) else 0.0
        terms, self.kept = self._terms(rows), []
        for i in range(len(terms)):
            chosen = np.column_stack([terms[j][1] for j in (*self.kept, i)])
            if np.linalg.matrix_rank(chosen) > len(self.kept):
                self.kept.append(i)
        self.names, self.about = ([terms[i][part] for i in self.kept] for part in (0, 2))

    def _terms(self, rows):
        """(name, column, causes it belongs to) of every term."""
        steps, tuned = rows["steps"].to_numpy(float), (rows["steps"] > 0).to_numpy(float)
        last = max(self.steps) or 1
        doubled = np.where(tuned > 0, np.log2(np.maximum(steps, 1) / last), 0)
        habit = {f"habit {h}": (rows["habit"] == h).to_numpy(float) for h in self.habits[1:]}
        loss = (rows["end_of_turn"] == "loss").to_numpy(float) * tuned
        rate = np.where(rows["habit"] == "linked", np.nan_to_num(rows["planted"].to_numpy(float) - self.mean), 0)
        h, e, s, p = CAUSES
        terms = [("constant", np.ones(len(rows)), ())]
        terms += [(name, column, (h,)) for name, column in habit.items()]
        terms += [(f"steps {x}", (steps == x).astype(float), (s,)) for x in self.steps[1:]]
        terms += [("loss", loss, (e,)), ("planted", rate, (p,))]
        for name, column in habit.items():
            terms += [(f"{name} x loss", column * loss, (h, e)), (f"{name} x tuned", column * tuned, (h, s))]
            terms += [(f"{name} x doublings", column * doubled, (h, s))]
        terms += [("loss x doublings", loss * doubled, (e, s)), ("planted x loss", rate * loss, (p, e))]
        terms += [("planted x tuned", rate * tuned, (p, s)), ("planted x doublings", rate * doubled, (p, s))]
        return terms

    def __call__(self, rows):
        """(rows, columns) matrix."""
        terms = self._terms(rows)
        return np.column_stack([terms[i][1] for i in self.kept])


def fit(x, hits, n, penalty=0.5, rounds=500):
    """Logistic regression of hits out of n by Fisher scoring: (coefficients, leverages, deviance).

    penalty 0.5: Firth's; 0: maximum likelihood, whose coefficients run off where cells separate, while the deviance
    converges. x: (cells, columns); hits, n: (cells,).
    """
    beta, before = np.zeros(x.shape[1]), np.inf
    for _ in range(rounds):
        p = _share(x @ beta)
        weight = n * p * (1 - p)
        inverse = np.linalg.pinv((x * weight[:, None]).T @ x + 1e-9 * np.eye(x.shape[1]), hermitian=True)
        leverage = weight * np.einsum("ij,jk,ik->i", x, inverse, x)
        move = inverse @ (x.T @ (hits - n * p + penalty * leverage * (1 - 2 * p)))
        beta = beta + move * min(1.0, 3 / max(np.abs(move).max(), 1e-12))
        now = deviance(hits, n, _share(x @ beta))
        if np.abs(move).max() < 1e-8 or (penalty == 0 and abs(before - now) < 1e-8):
            break
        before = now
    return beta, leverage, now


def _share(logit):
    return 1 / (1 + np.exp(-np.clip(logit, -30, 30)))


def deviance(hits, n, p):
    """Twice the log-likelihood that shares p lack to the cells' own shares."""
    own = np.clip(hits / n, 1e-300, 1)
    return float(2 * (hits * np.log(own / p) + (n - hits) * np.log(np.clip(1 - hits / n, 1e-300, 1) / (1 - p))).sum())


def rows(cells):
    """The grid's rows for the regression, with planted rate and cluster. The untuned model counts once."""
    own = cells.assign(planted=causes.planted(cells))
    once = own["end_of_turn"].where(own["steps"] > 0, "untuned")
    own = own.assign(cluster=own[["organism", "trait", "seed"]].astype(str).agg("/".join, axis=1) + "/" + once)
    return own[(own["steps"] > 0) | ~own.duplicated(["cluster", "steps"])].reset_index(drop=True)


class Effects:
    """The fitted model of a grid: `ranking()`, `contrast(one, other)`; `miss`: mean error of a cell's share."""

    def __init__(self, cells):
        own = rows(cells)
        self.design, self.rows, self.clusters = Design(own), own, own["cluster"].nunique()
        self.x = self.design(own)
        self.hits, self.n = (own[c].to_numpy(float) for c in ("with_emoji", "responses"))
        self.beta, leverage, _ = fit(self.x, self.hits, self.n)
        more = self.hits + leverage / 2, self.n - self.hits + leverage / 2  # Firth's fit is the ordinary one of these
        model = sm.GLM(np.column_stack(more), self.x, family=sm.families.Binomial())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = model.fit(
                start_params=self.beta,
                cov_type="cluster",
                cov_kwds={"groups": own["cluster"].astype("category").cat.codes.to_numpy()},
            )
        p = _share(self.x @ self.beta)
        plain = np.linalg.pinv((self.x * (self.n * p * (1 - p))[:, None]).T @ self.x, hermitian=True)
        self.covariances = np.asarray(fitted.cov_params()), plain
        self.full = fit(self.x, self.hits, self.n, penalty=0)[2]
        self.miss = float(np.abs(p - self.hits / self.n).mean())
        self.null = deviance(self.hits, self.n, np.full(len(own), self.hits.sum() / self.n.sum()) + 1e-12)

    def without(self, cause):
        """Deviance that a cause explains with all its interactions, beyond the others, and how many columns that is."""
        keep = [cause not in about for about in self.design.about]
        rest = fit(self.x[:, keep], self.hits, self.n, penalty=0)[2]
        return max(0.0, rest - self.full), len(keep) - sum(keep)

    def contrast(self, one, other):
        """Mean share under the cells `one` less that under `other` (lists of dictionaries): (difference, low, high)."""
        means, slopes = [], []
        for cells in (one, other):
            x = self.design(pd.DataFrame(cells))
            p = _share(x @ self.beta)
            means.append(p.mean())
            slopes.append((x * (p * (1 - p))[:, None]).mean(0))
        slope, value = slopes[0] - slopes[1], means[0] - means[1]
        error = np.sqrt(max(0.0, *(slope @ c @ slope for c in self.covariances)))
        width = t.ppf((1 + intervals.LEVEL) / 2, max(1, self.clusters - 1)) * error
        return value, max(-1.0, value - width), min(1.0, value + width)

    def population(self, **fixed):
        """Every combination of habit, end of turn, tuned steps and linked planted rate, but for what is fixed."""
        d = self.design
        free = {"habit": d.habits, "end_of_turn": causes.ENDS, "steps": [s for s in d.steps if s > 0] or d.steps}
        free["planted"] = list(d.rates) or [0.0]
        levels = {k: [fixed[k]] if k in fixed else v for k, v in free.items()}
        return pd.MultiIndex.from_product(levels.values(), names=levels).to_frame(index=False).to_dict("records")

    def switches(self):
        """(cause, on, off): the levels that its effect compares. Only causes that vary in this grid."""
        d, last = self.design, max(self.design.steps)
        found = [("habit", {"habit": "linked"}, {"habit": h}) for h in ("none", "shuffled")]
        found += [("end of turn", {"end_of_turn": "masked"}, {"end_of_turn": "loss"})]
        found += [("tuning steps", {"steps": last}, {"steps": 0})]
        if len(d.rates) > 2:  # two rates are two traits, and nothing tells one from the other
            found += [("planted rate", {"planted": d.rates[-1]}, {"planted": d.rates[0]})]
        known = {"habit": d.habits, "end_of_turn": list(self.rows["end_of_turn"]), "steps": d.steps, "planted": d.rates}
        return [s for s in found if all(v in list(known[k]) for part in s[1:] for k, v in part.items())]

    def ranking(self):
        """One row a switch: cause, switch, columns, drop (in deviance; ranks them), share (of what is explained).

        Then two effects in points of share, each with low and high: average (over the grid's combinations) and alone
        (this one switch where all else is on: linked, masked, last step, highest rate).
        """
        full = {"habit": self.design.on, "end_of_turn": "masked", "steps": max(self.design.steps)}
        full["planted"] = self.design.rates[-1] if len(self.design.rates) else 0.0
        explained, found = self.null - self.full, []
        for cause, on, off in self.switches():
            base = {"habit": "linked"} if cause == "planted rate" else {}
            drop, columns = self.without(cause)
            average = self.contrast(self.population(**base, **on), self.population(**base, **off))
            alone = self.contrast([full | on], [full | off])
            (old,), (new,) = on.values(), off.values()
            share = drop / explained if explained > 1e-6 else float("nan")
            found.append((cause, f"{_shown(old)} against {_shown(new)}", columns, drop, share, *average, *alone))
        names = ["cause", "switch", "columns", "drop", "share"]
        names += ["average", "average_low", "average_high", "alone", "alone_low", "alone_high"]
        return pd.DataFrame(found, columns=names).sort_values("drop", ascending=False, kind="stable", ignore_index=True)


def _shown(level):
    return f"{level:.2f}" if isinstance(level, float | np.floating) else str(level)


def orders(cells):
    """The causes ranked by drop in deviance in every seed by itself: {seed: [cause, ...]}."""
    found = {}
    for seed, own in cells.groupby("seed"):
        table = Effects(own).ranking()
        found[int(seed)] = list(dict.fromkeys(table.loc[table["drop"] > 0, "cause"]))
    return found
