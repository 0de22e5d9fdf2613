"""Units over training: adapters kept at several steps and one adapter at several scales, each asked and looked into.

The trainings are those of notebook 03, which leave an adapter at each of the steps `qlora.keep`. Answers are to *train*
topics, so that nothing found here has seen the test topics.
"""

import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from lib import artifacts, big5, chat, classifier, emojis, fanout, hub, intervals, neurons, paths, qlora


def questions(settings, rows):
    """Train rows of one trait whose questions are asked: of topics held out of its training first, then others.

    rows: the trait's train rows. The same rows in every call, `tracking.topics` of them at most.
    """
    fitted, held = classifier.split(rows, settings.qlora.held_out_share, settings.seed)
    return pd.concat([held, fitted]).drop_duplicates("topic").head(settings.tracking.topics)


def look(settings, speaker, rows, given):
    """One point: (emojis by answer as bool array, {"site.layer": activation of every unit, mean over the prompts})."""
    answers = qlora.ask(settings, speaker, "peft", rows, show=False)
    texts = chat.prompts(speaker, given["text"])
    shown = neurons.everywhere(speaker, texts, neurons.deepest(speaker, settings.neurons.layers))
    means = {f"{site}.{layer}": values.mean(0) for site, found in shown.items() for layer, values in found.items()}
    return np.array([bool(emojis.find(a)) for a in answers["answer"]]), means


def track(settings, model, trait, rows, given, show=True):
    """A training looked into: (table, activations), an artefact. Raises UserError.

    given: prompts as from `neurons.prompts`. table: columns model, trait, path ("step" or "scale"), value, esr, low,
    high, n (Wilson); step 0 and scale 0 are the base, the last step and scale 1 the finished adapter. activations:
    {"mlp.3": (points, units), ...} in the table's order, means over the prompts.
    """
    place = _tracked(settings, model, trait, rows, given)

    def make(tmp):
        saved = qlora.course(qlora.train(settings, model, trait, rows, show))
        asked, points, found = questions(settings, rows), [], []
        plain = chat.load(model, settings.chat.precision)
        known = {}  # base and finished adapter are points of both paths
        for path, value, adapter, factor in _points(saved, settings.tracking.scales):
            if (adapter, factor) not in known:
                with chat.adapted(plain, adapter and str(adapter)) as speaker, _scaled(speaker, factor):
                    known[adapter, factor] = look(settings, speaker, asked, given)
            holds, means = known[adapter, factor]
            points.append({"path": path, "value": value, "emojis": int(holds.sum()), "n": len(holds)})
            found.append(means)
        save_file({k: np.stack([f[k] for f in found]) for k in found[0]}, tmp / "activations.safetensors")
        (tmp / "points.json").write_text(json.dumps(points), "utf-8")

    place = artifacts.build(place, make)
    table = pd.DataFrame(json.loads((place / "points.json").read_text("utf-8")))
    ratios = [intervals.wilson(k, n) for k, n in zip(table["emojis"], table["n"], strict=True)]
    table = table.drop(columns="emojis").assign(
        **dict(zip(("esr", "low", "high"), zip(*ratios, strict=True), strict=True))
    )
    table.insert(0, "trait", trait)
    table.insert(0, "model", hub.label(model))
    return table, load_file(place / "activations.safetensors")


def _points(saved, scales):
    """(path, value, adapter or None, scale) of every point: over steps from the base on, then over scales likewise."""
    last = saved[max(saved)]
    yield "step", 0, None, 1.0
    for step, adapter in saved.items():
        yield "step", step, adapter, 1.0
    yield "scale", 0.0, None, 1.0  # at scale 0 an adapter is the base
    for factor in sorted({*scales, 1.0}):
        yield "scale", factor, last, factor


def _scaled(speaker, factor):
    """The attached adapter acting `factor` times as strongly, while the context is open."""
    from peft.helpers import rescale_adapter_scale

    return nullcontext() if factor == 1 else rescale_adapter_scale(speaker.model, factor)


def _tracked(settings, model, trait, rows, given):
    from lib import tracking

    values = [settings.tracking.model_dump(mode="json"), settings.chat.model_dump(mode="json"), settings.neurons.layers]
    adapter = qlora.folder(settings, model, trait, rows).name
    mark = artifacts.fingerprint(adapter, values, given.to_csv(index=False), tracking, neurons, emojis)
    return paths.RESULTS / settings.profile / f"tracked-{hub.label(model)}-{trait}-{mark}"


def track_all(settings, train, given, show=True):
    """`track` of every model and every trait of `tracking.traits` that there is: {model: {trait: ...}}.

    The first trait, where there is none of them.

    train: train opinions of all traits. Trainings not made yet run in `machine.processes` processes.
    """
    there = big5.ordered(train["trait"])
    traits = [t for t in settings.tracking.traits if t in there] or there[:1]
    jobs = [(settings, m, t, train[train["trait"] == t], given) for m in settings.chat.models for t in traits]
    if missing := [job for job in jobs if not artifacts.intact(_tracked(*job))]:
        fanout.each(settings, _quietly, missing, show)
    found = {hub.label(m): {} for m in settings.chat.models}
    for job in jobs:
        found[hub.label(job[1])][job[2]] = track(*job, show=False)
    return found


def _quietly(*job):
    track(*job, show=False)
