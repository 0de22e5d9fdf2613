"""Settings: one TOML file a profile, validated; unknown keys are refused.

A profile may name a `base` whose values it inherits. Overrides ("section.key" to value) come last.
Files named in a profile are relative to the repository, files named in an override to where the user stands.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import paths
from lib.errors import UserError

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Opinions(Section):
    source: Literal["files", "hub"]
    train: Path
    test: Path
    hub_id: str
    hub_revision: str
    train_topics: Annotated[int, Field(ge=0)]
    test_topics: Annotated[int, Field(ge=0)]
    allow_emoji: bool


class Dataset(Section):
    prior_words: Annotated[float, Field(gt=0)]
    themes: Annotated[int, Field(ge=2)]
    theme_texts: Annotated[int, Field(ge=100)]
    cloud_words: Count
    draws: Annotated[int, Field(ge=100)]


class Classifier(Section):
    validation_share: Share
    tfidf_ngrams: Count
    tfidf_min_df: Count
    tfidf_c: list[Annotated[float, Field(gt=0)]]
    encoder: str
    steps: Count
    epochs: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_tokens: Annotated[int, Field(ge=8)]
    token_dropout: Annotated[float, Field(ge=0, lt=1)]
    frozen_layers: Annotated[int, Field(ge=0)]
    precision: Literal["auto", "fp32", "bf16"]
    curve_topics: list[Count]
    curve_seeds: Count
    encoder_curve_topics: list[Count]


class Explain(Section):
    topic: str
    trait: str
    lime_samples: Annotated[int, Field(ge=50)]
    shap_evaluations: Annotated[int, Field(ge=50)]
    stability_seeds: Annotated[int, Field(ge=2)]
    agreement_rows: Annotated[int, Field(ge=2)]
    faithful_rows: Annotated[int, Field(ge=2)]
    faithful_words: Count
    random_draws: Count


class Settings(Section):
    about: str
    minutes: dict[str, float]
    opinions: Opinions
    dataset: Dataset
    classifier: Classifier
    explain: Explain
    # set by `load`, not by the file
    profile: str
    seed: Annotated[int, Field(ge=0)]
    overrides: dict[str, Any]


def names():
    """The profiles there are."""
    return sorted(p.stem for p in paths.PROFILES.glob("*.toml"))


def parse_override(text):
    """Split "section.key=value" and read the value as TOML, or else as plain text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: expected key=value, as in --set classifier.epochs=2")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _close(word, choices):
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"


def _read(profile):
    path = paths.PROFILES / f"{profile}.toml"
    if profile not in names():
        raise UserError(f"profile {profile!r}: no such profile in profiles/; {_close(profile, names())}")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"profiles/{path.name}: not TOML: {error}; mend that line") from None
    base = values.pop("base", None)
    if base is None:
        return values
    merged = _read(base)
    for section, part in values.items():
        inherited = merged.get(section)
        merged[section] = {**inherited, **part} if isinstance(part, dict) and isinstance(inherited, dict) else part
    return merged


def _place(values, root):
    """Make the file settings of `values` ({"train": ..., "test": ...}) absolute."""
    return {
        k: str(root / Path(v).expanduser()) if k in ("train", "test") and isinstance(v, str) else v
        for k, v in values.items()
    }


def load(profile="tiny", seed=0, overrides=None, cwd=None):
    """Validated `Settings` of a profile. Raises UserError naming the key, the value and a remedy."""
    values = _read(profile)
    values["opinions"] = _place(values.get("opinions", {}), paths.ROOT)
    for key, value in (overrides or {}).items():
        section, _, field = key.partition(".")
        known = [f"{s}.{f}" for s, part in values.items() if isinstance(part, dict) for f in part]
        if key not in known and not (section == "minutes" and field):
            raise UserError(f"setting {key}: no such key; {_close(key, known)}")
        placed = _place({field: value}, Path(cwd or Path.cwd())) if section == "opinions" else {field: value}
        values[section] = {**values[section], **placed}
    try:
        return Settings(**values, profile=profile, seed=seed, overrides=overrides or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"profiles/{profile}.toml, {where}: no such key; remove or correct it") from None
        raise UserError(f"setting {where} = {first['input']!r}: {first['msg'].lower()}; correct the value") from None


def plain(overrides, cwd=None):
    """`overrides` with file settings made absolute, so that they mean the same from any folder."""
    result = {}
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        root = Path(cwd or Path.cwd())
        result[key] = _place({field: value}, root)[field] if section == "opinions" else value
    return result
