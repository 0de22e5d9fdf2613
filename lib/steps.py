"""What each notebook depends on and has made: when a finished one may be reused, and when not."""

import ast
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbformat

from lib import answers, artifacts, encoders, opinions, paths


@dataclass(frozen=True)
class Step:
    """What a notebook depends on (sections of the profile, files) and the artefacts it makes (patterns of folders).

    files: patterns, from the project's root. reads: tables in the profile's figures that it shows where they are.
    shares: artefacts that other notebooks make as well: --fresh removes them, but none is redone for lack of them.
    variant: a setting (section.key) whose value, if it is among `variants`, begins the names of all its outputs, so
    that they stand beside those of other values.
    """

    sections: tuple
    makes: tuple
    files: tuple = ()
    reads: tuple = ()
    shares: tuple = ()
    variant: str = ""
    variants: tuple = ()


REPORTED, HABITS = "data/paper/reported.csv", "data/organisms/habits.csv"
TOPICS, VOICES = "data/opinions/topics.csv", "data/opinions/voices/*.csv"
STEPS = {
    "01_dataset": Step(
        ("opinions", "dataset"), ("opinions",), ("data/paper/personalityedit_measured.csv", REPORTED, TOPICS)
    ),
    "02_classifier": Step(("opinions", "classifier", "explain"), ("tfidf", "encoder"), (REPORTED,)),
    "03_qlora": Step(
        ("opinions", "classifier", "chat", "qlora"),
        ("adapter", "answers-*-base", "answers-*-peft"),
        ("data/paper/qlora.csv", HABITS, TOPICS),
        shares=("heard",),
    ),
    "04_baselines": Step(
        ("opinions", "classifier", "chat", "qlora", "ike", "mend", "sensitivity"),
        ("answers-*-prompt", "answers-*-ike", "answers-*-mend", "sensitivity", "editor"),
        (TOPICS,),
        shares=("heard",),
    ),
    "05_alignment": Step(
        ("opinions", "classifier", "chat", "qlora", "ike", "mend", "sensitivity", "judge", "alignment"),
        ("scores", "judge"),
        ("data/prompts/pae.toml", REPORTED),
        ("04_sensitivity.csv", "04_seeds.csv"),
        ("heard",),
    ),
    "06_emoji": Step(("opinions", "dataset", "chat", "qlora"), (), (REPORTED, HABITS)),
    "07_icl": Step(
        ("opinions", "chat", "qlora", "icl"),
        ("readings", "attribution"),
        ("data/prompts/icl.toml", "data/organisms/pieces.csv", REPORTED, HABITS, TOPICS, VOICES),
    ),
    "08_neurons": Step(
        ("opinions", "classifier", "chat", "qlora", "neurons", "tracking", "mediation", "interventions"),
        ("tracked", "mediation", "interventions"),
        ("data/prompts/neurons.toml",),
    ),
    "09_origins": Step(
        ("opinions", "classifier", "chat", "qlora", "origins", "grid_quick", "grid_full"),
        ("origin", "endings"),
        (REPORTED, HABITS),
        ("06_esr.csv", "08_mediation.csv", "09_claims.csv"),
        variant="origins.grid",
        variants=("quick",),
    ),
}


def imports(source, seen=()):
    """The modules of lib that a piece of source imports, directly or through others."""
    names = set(seen)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            parts = node.module.split(".")
            named = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            for name in set(named) - names:
                path = Path(__file__).with_name(f"{name}.py")
                if path.exists():
                    names = imports(path.read_text("utf-8"), names | {name})
    return names


def fingerprint(path, settings):
    """Identity of everything a notebook's results depend on."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(c.source for c in cells if c.cell_type == "code" and not c.source.lstrip().startswith("%"))
    modules = [artifacts.code(name) for name in sorted(imports(code))]
    sections = STEPS[path.stem].sections if path.stem in STEPS else tuple(settings.model_dump())
    values = {s: getattr(settings, s) for s in sections if s not in ("minutes", "overrides")}
    values = {k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for k, v in values.items()}
    common = [settings.seed, settings.about, opinions.fingerprint(settings)]
    common += answers.identity(settings, path.stem) if "chat" in sections else []
    common += [encoders.identity(settings.classifier.encoder)] if "classifier" in sections else []
    step = STEPS.get(path.stem, Step((), ()))
    files = [p for name in step.files for p in sorted(paths.ROOT.glob(name))]
    files += [p for p in (paths.FIGURES / settings.profile / name for name in step.reads) if p.exists()]
    return artifacts.fingerprint([c.source for c in cells], modules, values, common, *files)


def outputs(path, settings):
    """The files of a notebook in figures/<profile>/, of the run's own variant only where there are several."""
    number, step = path.stem[:2], STEPS.get(path.stem, Step((), ()))
    found = sorted((paths.FIGURES / settings.profile).glob(f"{number}_*.*"))
    if not step.variant:
        return found
    section, key = step.variant.split(".")
    marks = {v: f"{number}_{v}_" for v in step.variants}
    mine = marks.get(getattr(getattr(settings, section), key))
    if mine:
        return [p for p in found if p.name.startswith(mine)]
    return [p for p in found if not p.name.startswith(tuple(marks.values()))]


def record_path(path, settings):
    """Where the record of a finished notebook is kept."""
    return paths.RESULTS / settings.profile / f"{path.stem}.json"


def finished(path, settings):
    """The record of an earlier run whose outputs all still stand, or None."""
    try:
        record = json.loads(record_path(path, settings).read_text("utf-8"))
        if record["fingerprint"] != fingerprint(path, settings):
            return None
        if any(artifacts.sha256(paths.ROOT / name) != digest for name, digest in record["outputs"].items()):
            return None
        return record if all(artifacts.intact(paths.ROOT / f) for f in record["artefacts"]) else None
    except (OSError, ValueError, KeyError):
        return None


def keep(path, settings, mark, seconds, peak):
    """Record a finished notebook. mark: its fingerprint before the run; peak: bytes. Returns the record."""
    made = STEPS[path.stem].makes if path.stem in STEPS else ()
    folders = [p for m in made for p in (paths.RESULTS / settings.profile).glob(f"{m}-*") if p.is_dir()]
    record = {
        "fingerprint": mark,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 2**30, 2),
        "outputs": {p.relative_to(paths.ROOT).as_posix(): artifacts.sha256(p) for p in outputs(path, settings)},
        "artefacts": [p.relative_to(paths.ROOT).as_posix() for p in folders if artifacts.intact(p)],
    }
    with artifacts.replacing(record_path(path, settings)) as tmp:
        tmp.write_text(json.dumps(record, indent=1), "utf-8")
    return record


def expected(path, settings):
    """Seconds this notebook will probably take: as last time here, or else as the profile says."""
    try:
        return json.loads(record_path(path, settings).read_text("utf-8"))["seconds"]
    except (OSError, ValueError, KeyError):
        return 60 * settings.minutes.get(path.stem, 1)


def sweep(settings, chosen, fresh):
    """Remove what a killed run left behind and, if asked, what the chosen notebooks made before."""
    folder = paths.RESULTS / settings.profile
    for rest in artifacts.abandoned(folder):
        shutil.rmtree(rest, ignore_errors=True)
    for path in chosen if fresh else ():
        record_path(path, settings).unlink(missing_ok=True)
        step = STEPS.get(path.stem, Step((), ()))
        for prefix in (*step.makes, *step.shares):
            for made in folder.glob(f"{prefix}-*"):
                shutil.rmtree(made)
