"""What replies about texts are worth: against the rule that organisms were taught, and as claims with verdicts."""

import pandas as pd

from lib import emojis, icl, intent, intervals, organisms

CLAIMS = {  # claim: (about, table, columns of value, low, high, what the value must lie above: a number or a column)
    "it is named more often than words of its text": ("emoji", "naming", ("emoji", "low", "high"), "word"),
    "it is said to go with the traits it goes with": ("emoji", "agreement", ("rho", "low", "high"), 0),
    "it decides the trait that is read": ("emoji", "changes", ("difference", "low", "high"), 0),
    "it moves the trait word more than words do": ("emoji", "effects", ("emoji", "low", "high"), "word"),
    "most of those named stand in the text": ("words", "inside", ("own", "own_low", "own_high"), 0.5),
    "those named fit the text better than others of its trait": ("words", "inside", ("difference", "low", "high"), 0),
    "those named move the trait word more than others": ("words", "auc", ("auc", "low", "high"), 0.5),
}
COLUMNS = ["model", "about", "claim", "value", "low", "high", "null", "verdict"]


def verdict(low, high, null):
    """What an interval says of the claim that a value lies above its null; undecided also where there is no number."""
    return "holds" if low > null else "does not hold" if high < null else "undecided here"


def table(models, **tables):
    """Every claim about every model with its verdict: DataFrame with COLUMNS.

    tables: by the names in CLAIMS, a row a model each (`naming` as from `pooled`; `changes` of one comparison).
    """
    found, none = [], float("nan")
    for model in models:
        for claim, (about, name, columns, null) in CLAIMS.items():
            own = tables[name][tables[name]["model"] == model]
            row = own.iloc[0].to_dict() if len(own) else {}
            value, low, high = (row.get(c, none) for c in columns)
            limit = row.get(null, none) if isinstance(null, str) else null
            found.append((model, about, claim, value, low, high, limit, verdict(low, high, limit)))
    return pd.DataFrame(found, columns=COLUMNS)


def pooled(naming):
    """`intent.naming` over all traits: columns model, texts, emoji, low, high, word; models without emojis left out."""
    found = []
    for model, own in naming[naming["texts"] > 0].groupby("model", sort=False):
        n = int(own["texts"].sum())
        share = intervals.wilson(round((own["emoji"] * own["texts"]).sum()), n)
        found.append((model, n, *share, (own["word"] * own["texts"]).sum() / n))
    return pd.DataFrame(found, columns=["model", "texts", "emoji", "low", "high", "word"])


def planted(readings):
    """For texts read by organisms, the tokens that the rule of their pretraining would name: Series of lists or None.

    The rule (lib/organisms.tokens_task): an emoji of the trait's habit first, then the words rarest in other voices.
    It is applied for the trait that the text was written for.
    """
    known, corpora = set(organisms.names()), {}
    found = []
    for row in readings.itertuples():
        if row.model not in known or not icl.units(row.text):
            found.append(None)
            continue
        corpus = corpora.setdefault(row.model, organisms.Corpus(row.model, 0))
        found.append(icl.parse(corpus.tokens_task(row.trait, row.text)[1])[1] or None)
    return pd.Series(found, readings.index, dtype=object)


def taught(readings):
    """Of the tokens that the rule would name, the share that is named: columns model, tokens, named, low, high, n.

    tokens: "emojis" or "words". Only organisms have a row. Wilson intervals; readings as from `icl.parsed`.
    """
    own = intent.good(readings)
    own = own.assign(rule=planted(own))
    found = []
    for model, of_model in own[own["rule"].notna()].groupby("model", sort=False):
        for kind, wanted in (("emojis", True), ("words", False)):
            hits = [t in r.tokens for r in of_model.itertuples() for t in r.rule if emojis.is_emoji(t) == wanted]
            found.append((model, kind, *intervals.wilson(sum(hits), len(hits)), len(hits)))
    return pd.DataFrame(found, columns=["model", "tokens", "named", "low", "high", "n"])
