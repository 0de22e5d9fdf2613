"""Settings: one TOML file a profile, validated; unknown keys are refused.

A profile may name a `base` whose values it inherits. Overrides ("section.key" to value) come last.
Files named in a profile are relative to the repository, files named in an override to where the user stands.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lib import big5, paths
from lib.errors import UserError

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Demonstrations = Annotated[str, Field(pattern=r"^(fixed(-[1-9][0-9]*)?|random|nearest)$")]


def _listed(value):
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


def _by_model(value):
    """{model: value} of a value for all models or of such a table, which must say what any other model takes."""
    table = value if isinstance(value, dict) else {"other": value}
    if "other" not in table:
        raise ValueError("a table needs a value named other, for all models without one of their own")
    return table


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
    dropout: Annotated[float, Field(ge=0, lt=1)]
    frozen_layers: Annotated[int, Field(ge=0)]
    precision: Literal["auto", "fp32", "bf16"]
    curve_topics: list[Count]
    curve_seeds: Count
    encoder_curve_topics: list[Count]


class Explain(Section):
    topic: str
    trait: str
    lime_samples: Annotated[int, Field(ge=20)]
    shap_evaluations: Annotated[int, Field(ge=20)]
    stability_seeds: Annotated[int, Field(ge=2)]
    agreement_rows: Annotated[int, Field(ge=2)]
    faithful_rows: Annotated[int, Field(ge=2)]
    faithful_words: Count
    random_draws: Count


class Chat(Section):
    models: Names
    precision: Literal["fp32", "bf16", "nf4", "nf4-double"]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    topics: Annotated[int, Field(ge=0)]
    batch_size: Count


class Qlora(Section):
    rank: Count
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Names
    end_of_turn: bool
    epochs: Annotated[float, Field(gt=0)]
    steps: Annotated[dict[str, Count], BeforeValidator(_by_model)]
    batch_size: Count
    accumulation: Count
    learning_rate: Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_by_model)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
    max_tokens: Annotated[int, Field(ge=16)]
    gradient_checkpointing: bool
    held_out_share: Share
    save_steps: Count
    keep: list[Count]


class Ike(Section):
    persona: Annotated[int, Field(ge=0)]
    wording: Annotated[int, Field(ge=0)]
    demonstrations: Demonstrations
    number: Count


class Sensitivity(Section):
    models: Annotated[int, Field(ge=0)]
    traits: Annotated[list[Literal[big5.NAMES]], BeforeValidator(_listed), Field(min_length=1)]
    wordings: Count
    sets: Annotated[list[Demonstrations], BeforeValidator(_listed), Field(min_length=1)]
    topics: Annotated[int, Field(ge=2)]
    seeds: Annotated[int, Field(ge=2)]


class Mend(Section):
    precision: Literal[
        "auto", "fp32", "bf16", "nf4", "nf4-double"
    ]  # the last two are refused by lib/mend, which says why
    layers: Count
    modules: Names
    rank: Count
    hidden_layers: Count
    edit_lr: Annotated[float, Field(gt=0)]
    edit_lr_learning_rate: Annotated[float, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    edit_weight: Annotated[float, Field(ge=0)]
    unlikelihood_weight: Annotated[float, Field(ge=0)]
    locality_weight: Annotated[float, Field(ge=0)]
    batch_size: Count
    steps: Count
    max_grad_norm: Annotated[float, Field(gt=0)]
    max_tokens: Annotated[int, Field(ge=16)]
    statistics_rows: Annotated[int, Field(ge=2)]
    held_out_share: Share
    validation_rows: Count
    validate_steps: Count
    patience: Count
    save_steps: Count


class Judge(Section):
    kind: Literal["embedding", "openai", "local"]
    calibration_topics: Annotated[int, Field(ge=10)]
    model: str
    base_url: str
    key_variable: str
    request: dict[str, Any]
    timeout_s: Annotated[float, Field(gt=0)]
    retries: Annotated[int, Field(ge=0)]
    wait_s: Annotated[float, Field(ge=0)]
    concurrency: Annotated[int, Field(ge=1, le=64)]
    confirm_calls: Annotated[int, Field(ge=0)]
    max_new_tokens: Count


class Alignment(Section):
    entropy: Annotated[float, Field(gt=0)]
    topics: Annotated[int, Field(ge=0)]
    batch_tokens: Annotated[int, Field(ge=64)]
    draws: Annotated[int, Field(ge=100)]


class Machine(Section):
    processes: Annotated[int, Field(ge=0)]


class Origins(Section):
    grid: Literal["quick", "full"]
    models: Annotated[dict[str, str], Field(min_length=1)]
    topics: Annotated[int, Field(ge=2)]


class Grid(Section):
    traits: Names
    seeds: Count
    points: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    control_traits: Names
    sweep_traits: Names
    sweep_seeds: Count
    sentences: list[Annotated[int, Field(ge=0)]]
    rank: list[Count]
    learning_rate: list[Annotated[float, Field(gt=0)]]
    precision: list[Literal["fp32", "bf16", "nf4", "nf4-double"]]
    steps: list[Count]
    scale: list[Annotated[float, Field(ge=0)]]
    max_new_tokens: list[Count]


class Neurons(Section):
    layers: Annotated[int, Field(ge=0)]
    top: Count
    shown: Annotated[int, Field(ge=1, le=40)]
    overlap: Count
    always_on: Annotated[float, Field(gt=0)]


class Tracking(Section):
    traits: Annotated[list[Literal[big5.NAMES]], BeforeValidator(_listed), Field(min_length=1)]
    scales: list[Annotated[float, Field(gt=0, lt=1)]]
    topics: Count
    shuffles: Annotated[int, Field(ge=10)]


class Mediation(Section):
    topics: Annotated[int, Field(ge=0)]
    batch_tokens: Annotated[int, Field(ge=64)]
    draws: Annotated[int, Field(ge=100)]


class Interventions(Section):
    traits: Annotated[list[Literal[big5.NAMES]], BeforeValidator(_listed)]
    sites: Annotated[list[Literal["mlp", "hidden"]], BeforeValidator(_listed), Field(min_length=1)]
    ks: Annotated[list[Count], Field(min_length=1)]
    train_topics: Count
    topics: Count
    random_draws: Annotated[int, Field(ge=2)]
    random_topics: Count
    batch_size: Count
    batch_tokens: Annotated[int, Field(ge=64)]
    draws: Annotated[int, Field(ge=100)]


class Icl(Section):
    wording: Literal["auto", "organism", "instruct"]
    reader: Literal["base", "peft"]
    max_new_tokens: Count
    tries: Annotated[int, Field(ge=1, le=10)]
    beside: Annotated[int, Field(ge=1)]
    topics: Annotated[int, Field(ge=1)]
    attributed: Annotated[int, Field(ge=1)]
    most: Count
    batch_tokens: Annotated[int, Field(ge=64)]
    draws: Annotated[int, Field(ge=100)]


class Settings(Section):
    about: str
    minutes: dict[str, float]
    machine: Machine
    opinions: Opinions
    dataset: Dataset
    classifier: Classifier
    explain: Explain
    chat: Chat
    qlora: Qlora
    ike: Ike
    mend: Mend
    sensitivity: Sensitivity
    judge: Judge
    alignment: Alignment
    origins: Origins
    grid_quick: Grid
    grid_full: Grid
    neurons: Neurons
    tracking: Tracking
    mediation: Mediation
    interventions: Interventions
    icl: Icl
    # set by `load`, not by the file
    profile: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]  # NumPy takes 32 bits, and some seeds are counted on from it
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
    """Make the files and folders that `values` names absolute: {"train": ..., "models": [...], "encoder": ...}.

    A model or encoder that is no folder below `root` is left as it is: a hub id, or the packaged encoder.
    """

    def model(name):
        path = root / Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() or name.startswith((".", "~", "/", "data/")) else name

    placed = dict(values)
    for key in {"train", "test"} & values.keys():
        if isinstance(values[key], str):
            placed[key] = str(root / Path(values[key]).expanduser())
    if isinstance(names := placed.get("models"), dict):
        placed["models"] = {k: model(m) if isinstance(m, str) else m for k, m in names.items()}
    elif names:
        names = [names] if isinstance(names, str) else names
        placed["models"] = [model(m) if isinstance(m, str) else m for m in names]
    for key in {"model", "encoder"} & values.keys():
        if isinstance(values[key], str) and values[key] != "packaged":
            placed[key] = model(values[key])
    return placed


PLACED = ("opinions", "classifier", "chat", "judge", "origins")  # sections that name files or folders


def load(profile="tiny", seed=0, overrides=None, cwd=None):
    """Validated `Settings` of a profile. Raises UserError naming the key, the value and a remedy."""
    values = _read(profile)
    for section in PLACED:
        values[section] = _place(values.get(section, {}), paths.ROOT)
    for key, value in (overrides or {}).items():
        section, _, field = key.partition(".")
        known = [f"{s}.{f}" for s, part in values.items() if isinstance(part, dict) for f in part]
        if key not in known and not (section == "minutes" and field):
            raise UserError(f"setting {key}: no such key; {_close(key, known)}")
        placed = _place({field: value}, Path(cwd or Path.cwd())) if section in PLACED else {field: value}
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
        result[key] = _place({field: value}, root)[field] if section in PLACED else value
    return result
