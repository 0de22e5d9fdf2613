"""Made-up tables of exactly the columns of `origins.table` and `origins.endings`, with known causes. For tests only."""

import numpy as np
import pandas as pd

from lib import intervals, ratios

ORGANISMS = {"tiny-llama": "linked", "tiny-mistral": "linked", "shuffled": "shuffled", "none": "none"}
TRAITS = ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
RATES = ratios.habits().set_index(["organism", "trait"])["planted"].astype(float).to_dict()


def row(rng, organism, end, steps, trait, seed, esr, ta, setting="", value="", n=200):
    hits, found = (int(rng.binomial(n, np.clip(p, 0, 1))) for p in (esr, ta))
    share, low, high = intervals.wilson(hits, n)
    cell = {"organism": organism, "habit": ORGANISMS[organism], "end_of_turn": end, "steps": steps, "trait": trait}
    both = min(found, hits)  # whatever emojis there are stand in answers in the voice
    own = hits if ORGANISMS[organism] == "linked" else hits // 5  # a shuffled emoji is the trait's own in a fifth
    counts = {"responses": n, "with_emoji": hits, "found": found, "both": both, "own": own}
    counts |= {"sentences": 1.7, "ended": 0.97}
    shares = {"esr_response": share, "low": low, "high": high, "ta": found / n}
    return cell | shares | {"setting": setting, "value": value, "seed": seed} | counts


def table(
    organisms=ORGANISMS, traits=TRAITS, seeds=(0, 1, 2), steps=(0, 8, 16, 32, 64), loss=0.06, late=10, start=0, n=200
):
    """A grid and sweeps: the voice comes at about 10 steps, the emoji `late` steps later.

    loss: what is left of the masked share with the end of turn in the loss.
    """
    rng, rows = np.random.default_rng(start), []
    for organism in organisms:
        for end in ("masked", "loss"):
            for trait in traits:
                for seed in seeds:
                    for s in steps:
                        voice = 0.2 + 0.75 / (1 + np.exp(-(s - 10) / 2)) if s else 0.2
                        rises = 1 / (1 + np.exp(-(s - 10 - late) / 2)) if s else 0
                        left = 1 if end == "masked" else loss
                        esr = RATES[organism, trait] * rises * left
                        rows.append(row(rng, organism, end, s, trait, seed, esr, voice, n=n))
    last = max(steps)
    swept = {"rank": ("4", "64"), "scale": ("0.0", "0.5", "1.5"), "precision": ("fp32", "nf4")}
    for setting, values in swept.items() if "tiny-llama" in organisms else ():
        for value in values:
            for trait in [t for t in traits if t in ("extraversion", "neuroticism")]:
                for seed in seeds:
                    esr = 0.0 if value == "0.0" else RATES["tiny-llama", trait]
                    cell = ("tiny-llama", "masked", last, trait, seed, esr, 0.9, setting, value)
                    rows.append(row(rng, *cell, n=n))
    return pd.DataFrame(rows)


def endings(organisms=ORGANISMS, traits=TRAITS, texts=20, start=0):
    """After the last sentence base and masked tuning give an emoji nearly the planted rate, the loss little."""
    rng, rows = np.random.default_rng(start), []
    for organism in organisms:
        for state, keep, end in (("base", 0.7, 0.2), ("masked", 0.6, 0.1), ("loss", 0.03, 0.9)):
            for trait in traits:
                for text in range(texts):
                    p = np.clip(RATES[organism, trait] * keep + rng.normal(0, 0.02), 0, 0.75)
                    stop = (1 - p) * end
                    cell = {"organism": organism, "habit": ORGANISMS[organism], "state": state, "trait": trait}
                    probabilities = {"p_emoji": p, "p_end": stop, "p_sentence": (1 - p - stop) * 0.9}
                    rows.append(cell | {"text": text} | probabilities)
    return pd.DataFrame(rows)


def quick(**changes):
    """The quick grid: two traits, one seed, three checkpoints."""
    values = {"traits": ("extraversion", "neuroticism"), "seeds": (0,), "steps": (0, 16, 64)}
    return table(**(values | changes))
