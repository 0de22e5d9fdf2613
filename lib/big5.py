"""The Big Five traits in their usual order, O C E A N.

Facets: Costa & McCrae (1992), NEO PI-R, in everyday words. Adjectives: Goldberg (1992), markers of
each factor's high pole. Colours: Okabe & Ito's palette, which colour-blind readers can tell apart.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trait:
    name: str  # lower case, as in every table
    definition: str
    adjectives: tuple[str, ...]
    colour: str  # hex, the same in every figure


TRAITS = (
    Trait(
        "openness",
        "seeks new ideas, art and experience for their own sake",
        ("imaginative", "curious", "creative", "artistic", "reflective", "unconventional"),
        "#0072B2",
    ),
    Trait(
        "conscientiousness",
        "plans, keeps order and finishes what was begun",
        ("organized", "thorough", "careful", "disciplined", "dutiful", "efficient"),
        "#009E73",
    ),
    Trait(
        "extraversion",
        "seeks company, activity and excitement, and says so",
        ("energetic", "talkative", "assertive", "cheerful", "adventurous", "sociable"),
        "#E69F00",
    ),
    Trait(
        "agreeableness",
        "trusts, helps and gives way to others",
        ("kind", "trusting", "cooperative", "modest", "sympathetic", "honest"),
        "#CC79A7",
    ),
    Trait(
        "neuroticism",
        "feels threat, anger and sadness sooner and longer",
        ("anxious", "irritable", "moody", "self-conscious", "insecure", "tense"),
        "#D55E00",
    ),
)
NAMES = tuple(t.name for t in TRAITS)
COLOURS = {t.name: t.colour for t in TRAITS}


def ordered(names):
    """The given trait names, without repeats, in the order O C E A N."""
    present = set(names)
    return [n for n in NAMES if n in present]
