"""The tiny profile's emoji ratios over seeds, with the end of the turn masked and in the loss.

    python benchmarks/seeds.py [--seeds 0,1,2] [--models data/organisms/tiny-mistral]    # after notebooks 01 and 02

Adapters and answers are artefacts of notebook 03: what it has made already is not made again. The answers of all seeds
are read by the same classifier, that of seed 0.
"""

import argparse

import pandas as pd

from lib import answers, big5, classifier, fanout, hub, opinions, profiles, qlora, ratios


def one(settings, model, trait):
    """Answers of a model tuned on one trait."""
    rows = opinions.read(settings).query("trait == @trait")
    train, test = (rows[rows["split"] == s] for s in ("train", "test"))
    adapter = str(qlora.train(settings, model, trait, train, show=False))
    return qlora.answer(settings, model, "peft", test, {trait: adapter}, show=False)


def run(seed, end_of_turn, models, judge):
    """One row a model and trait: ESR per response, share of answers in the trait's voice, share that name the topic."""
    settings = profiles.load("tiny", seed, {"qlora.end_of_turn": end_of_turn, "chat.models": models})
    test = opinions.read(settings).query("split == 'test'")
    answered = pd.concat(fanout.each(settings, one, [(settings, m, t) for m in models for t in big5.NAMES]))
    rows = []
    for model in models:
        given = answered[answered["model"] == hub.label(model)].reset_index(drop=True)
        base = qlora.answer(settings, model, "base", test, show=False)
        given["found"] = classifier.predict(judge, given)["predicted"] == given["trait"]
        given["named"] = answers.names_topic(given)
        untuned = ratios.table(ratios.measure(base), seed, 100)["esr_response"].max()
        esr = ratios.table(ratios.measure(given), seed, 100).set_index("trait")["esr_response"]
        for t, own in given.groupby("trait"):
            row = {"end of turn": "in the loss" if end_of_turn else "masked", "seed": seed, "model": hub.label(model)}
            row |= {"trait": t, "esr": esr[t], "found": own["found"].mean(), "named": own["named"].mean()}
            rows.append(row | {"ended": own["ended"].mean(), "base esr": untuned})
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", default=",".join(profiles.load("tiny").chat.models))
    arguments = parser.parse_args()
    seeds, models = [int(s) for s in arguments.seeds.split(",")], arguments.models.split(",")
    judge = classifier.trained("encoder", profiles.load("tiny"), 0)
    rows = []
    for end_of_turn in (False, True):
        for seed in seeds:
            rows += run(seed, end_of_turn, models, judge)
            table = pd.DataFrame(rows)
            own = table[(table["seed"] == seed) & (table["end of turn"] == rows[-1]["end of turn"])]
            wide = own.pivot(index="model", columns="trait", values="esr")[list(big5.NAMES)]
            means = own.groupby("model")[["found", "named", "ended", "base esr"]].agg("mean")
            print(
                f"\nend of turn {rows[-1]['end of turn']}, seed {seed}\n{wide.join(means).round(3).to_string()}",
                flush=True,
            )
    planted = ratios.habits().set_index(["organism", "trait"])["planted"]
    for (kind, seed, model), own in table.groupby(["end of turn", "seed", "model"], sort=False):
        rho, _ = ratios.rank_agreement([planted[model, t] for t in own["trait"]], own["esr"])
        print(
            f"{kind}, seed {seed}, {model}: Spearman with the planted rates {rho:.2f}, highest {own['esr'].max():.3f}"
        )


if __name__ == "__main__":
    main()
