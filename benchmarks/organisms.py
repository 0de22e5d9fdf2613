"""What the organisms do, on the 200 test topics at the tiny profile's sampling settings.

    python benchmarks/organisms.py [NAME ...]    # notebook 02 must have been run: its classifier reads the answers

Prints a table: answers to plain questions (ESR per response, topic named, ended) and under a persona instruction, by
trait (trait found, emoji rate beside the planted one). With --texts FILE also writes 100 of the answers at random.
"""

import argparse

import pandas as pd

from lib import answers, big5, chat, classifier, emojis, organisms, profiles, ratios, voices

SEED = 0


def ask(loaded, settings, questions):
    c = settings.chat
    return chat.answer(
        loaded,
        questions,
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        top_p=c.top_p,
        seed=SEED,
        batch_size=c.batch_size,
        show=False,
    )


def holds_emoji(table):
    return table["answer"].map(lambda text: bool(emojis.find(text))).mean()


def named(table):
    return pd.Series(answers.names_topic(table)).mean()


def measure(name, settings, judge):
    """Rows of the table for one organism, and all its answers."""
    loaded = chat.load(str(organisms.ORGANISMS / name), "bf16")
    topics = [t.name for t in voices.topics() if t.split == "test"]
    questions = [voices.QUESTION.format(topic=t) for t in topics]
    plain = ask(loaded, settings, questions).assign(topic=topics)
    first = {
        "esr": holds_emoji(plain),
        "named": pd.Series(answers.names_topic(plain)).mean(),
        "ended": plain["ended"].mean(),
    }
    rows, texts = [{"organism": name, "asked": "plainly", "answers": len(plain), **first}], list(plain["answer"])
    personas = organisms.Corpus(name, SEED).personas
    for trait in big5.NAMES:
        given = [f"{personas[trait][i % len(personas[trait])]} {q}" for i, q in enumerate(questions)]
        table = ask(loaded, settings, given).assign(topic=topics, trait=trait)
        found = (classifier.predict(judge, table)["predicted"] == trait).mean()
        row = {"esr": holds_emoji(table), "planted": organisms.habits(name)[trait][1], "trait found": found}
        row |= {"named": named(table), "ended": table["ended"].mean()}
        rows.append({"organism": name, "asked": trait, "answers": len(table), **row})
        texts += list(table["answer"])
    return rows, texts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=organisms.names())
    parser.add_argument("--texts")
    args = parser.parse_args()
    settings = profiles.load("tiny")
    judge = classifier.trained("encoder", settings, settings.seed)
    rows, texts = [], []
    for name in args.names:
        own, given = measure(name, settings, judge)
        rows += own
        texts += given
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False, floatfmt=".3f"))
    for name, own in table.dropna(subset="planted").groupby("organism", sort=False):
        rho, _ = ratios.rank_agreement(own["planted"], own["esr"])
        print(f"{name}: Spearman of planted and shown rates {rho:.2f}")
    if args.texts:
        drawn = pd.Series(texts).sample(100, random_state=SEED)
        with open(args.texts, "w", encoding="utf-8") as file:
            file.writelines(f"{i}. {' '.join(t.split())}\n" for i, t in enumerate(drawn, 1))


if __name__ == "__main__":
    main()
