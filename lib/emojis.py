"""What an emoji is, here. One definition for the dataset's audit and every ratio.

An emoji is a grapheme cluster (UAX #29) that is shown as a picture: default emoji presentation
(Unicode property Emoji_Presentation), or a pictograph followed by U+FE0F, or a flag, a keycap or a
ZWJ sequence. So (c), (tm) and a bare U+263A are text; a skin tone belongs to its emoji.
Source: Unicode Technical Standard #51.
"""

import regex

_PICTURE = regex.compile(
    r"\p{Regional_Indicator}{2}"  # flag
    r"|[0-9#*]\uFE0F?\u20E3"  # keycap
    r"|(?!\p{Regional_Indicator})\p{Emoji_Presentation}"  # shown as a picture by default
    r"|\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]"  # asked to be shown as one
    r"|\p{Extended_Pictographic}\uFE0F?\u200D\p{Extended_Pictographic}"  # ZWJ sequence
)
_TEXT_STYLE = regex.compile(r"\uFE0E")  # asked to be shown as text
WORD_OR_EMOJI = regex.compile(r"[0-9#*]\uFE0F?\u20E3|\p{L}[\p{L}\p{M}\p{N}'\u2019-]*|\p{N}+|\X")


def is_emoji(grapheme):
    """Whether one grapheme cluster is an emoji."""
    return bool(_PICTURE.match(grapheme)) and not _TEXT_STYLE.search(grapheme)


def find(text):
    """The emojis of a text, in order, each a whole grapheme cluster."""
    if text.isascii():
        return []
    return [g for g in regex.findall(r"\X", text) if is_emoji(g)]


def tokens(text):
    """Words and emojis of a text in order, punctuation left out: what LIME, SHAP and the clouds count."""
    return [m for m, _ in spans(text)]


def spans(text):
    """`tokens` with their (start, end) character offsets."""
    return [
        (m.group(), m.span()) for m in WORD_OR_EMOJI.finditer(text) if m.group()[0].isalnum() or is_emoji(m.group())
    ]
