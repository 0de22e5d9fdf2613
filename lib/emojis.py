"""What an emoji is, here, and which sentence it belongs to. One definition for the audit and every ratio.

An emoji is a grapheme cluster (UAX #29) that is shown as a picture: default emoji presentation
(Unicode property Emoji_Presentation), or a pictograph followed by U+FE0F, or a flag, a keycap or a
ZWJ sequence. So (c), (tm) and a bare U+263A are text; a skin tone belongs to its emoji.
Source: Unicode Technical Standard #51.
"""

import functools
from bisect import bisect_left

import regex

_PICTURE = regex.compile(
    r"\p{Regional_Indicator}{2}"  # flag
    r"|[0-9#*]\uFE0F?\u20E3"  # keycap
    r"|(?!\p{Regional_Indicator})\p{Emoji_Presentation}"  # shown as a picture by default
    r"|\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]"  # asked to be shown as one
    r"|\p{Extended_Pictographic}\uFE0F?\u200D\p{Extended_Pictographic}"  # ZWJ sequence
)
_TEXT_STYLE = regex.compile(r"\uFE0E")  # asked to be shown as text
_SKIN = regex.compile(r"\p{Emoji_Modifier}")
WORD_OR_EMOJI = regex.compile(r"[0-9#*]\uFE0F?\u20E3|\p{L}[\p{L}\p{M}\p{N}'\u2019-]*|\p{N}+|\X")

# What ends a sentence besides the places that pysbd finds.
_CLOSERS = r"[\p{Pe}\p{Pf}\"'*_]*+"
_OPENERS = r"[\p{Ps}\p{Pi}\"'*_]*+"
_SURE_END = regex.compile(
    # which runs over "!!! So" ...
    rf"(?<![!?\u2026])[!?\u2026][.!?\u2026]*+{_CLOSERS}(?=\s+{_OPENERS}[\p{{Lu}}\p{{Lt}}\p{{Lo}}\p{{N}}])"
    r"|(?<=\b\p{Ll}{2,})\.(?=\s+I\b)"  # ... and takes "me. I" for an abbreviation
    r"|[\p{Sentence_Terminal}--\x00-\x7F]+",  # full stops of other scripts need no space
    regex.V1,
)
_AFTER_END = regex.compile(rf"({_CLOSERS})([\p{{L}}\p{{N}},;]?)")
_LAST_WORD = regex.compile(r"[\p{L}\p{M}\p{N}\p{Pe}\p{Pf}\"'*_%]$")
_SUBJECT = regex.compile(r"\b(I|[Ww]e|[Tt]hey|[Hh]e|[Ss]he)$")
_CAPITAL = regex.compile(r"\s*\p{Lu}")
_WORD = regex.compile(r"[\p{L}\p{N}]")
_NO_SPACE = regex.compile(r"[\p{Po}\p{Pe}\p{Pf}_]")
_FOREIGN = regex.compile(r"[^\x00-\x7F\u2018\u2019\u201c\u201d]")


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


def toneless(emoji):
    """An emoji without its skin tone, so that every thumb counts as one kind."""
    plain = _SKIN.sub("", emoji)
    return plain if is_emoji(plain) else f"{plain}\ufe0f" if plain else emoji


def attach(text):
    """The sentences of a text with their emojis: a list of (sentence without its emojis, [emojis]).

    An emoji belongs to the sentence it follows, one before any sentence to the first. A text of emojis only is one
    sentence, an empty text none. Abbreviations are told from ends by pysbd (English rules; Sadvilkar & Neumann 2020),
    which never sees the emojis: it would give a closing one to the next sentence.
    """
    sentences, places = locate(text)
    return [(s, [e for e, index, _ in places if index == i]) for i, s in enumerate(sentences)]


def locate(text):
    """As `attach`, with places: (sentences, [(emoji, index of its sentence, place)]).

    The place is the share of the text's characters before the emoji, other emojis and white space at either end not
    counted: 0 before the first character, 1 after the last, NaN in a text of emojis only.
    """
    bare, marks = _bare(text)
    if not bare:
        return ([""] if marks else []), [(emoji, 0, float("nan")) for emoji, _ in marks]
    ends = _ends(bare, {at for _, at in marks})
    sentences = [bare[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)]
    return sentences, [(emoji, bisect_left(ends, at), at / len(bare)) for emoji, at in marks]


def without(text):
    """A text without its emojis, white space single, and where its sentences end in it: (str, [offsets, in order]).

    The sentences are those of `locate`. No offset where no word or sign is left.
    """
    bare, marks = _bare(text)
    return bare, _ends(bare, {at for _, at in marks}) if bare else []


def _bare(text):
    """(the text without emojis, white space single; [(emoji, how many of its characters stand before)])."""
    kept, marks, gap = "", [], False
    for grapheme in regex.findall(r"\X", text):
        if is_emoji(grapheme):
            kept, gap = kept.rstrip(" "), True
            marks.append((grapheme, len(kept.rstrip())))
        elif grapheme.isspace():
            line = "\n" in grapheme or kept.endswith("\n")
            kept, gap = kept and kept.rstrip() + ("\n" if line else " "), False
        else:  # words stay apart without the emoji between them, punctuation moves up
            kept += f" {grapheme}" if gap and kept[-1:].strip() and not _NO_SPACE.match(grapheme) else grapheme
            gap = False
    return kept.rstrip(), marks


@functools.cache
def _segmenter():
    import pysbd

    return pysbd.Segmenter(language="en", clean=False)


def _ends(bare, places):
    """Offsets at which the sentences of an emoji-free text end, in order. places: where emojis stood."""
    found = {m.end() for m in _SURE_END.finditer(bare)} | {p for p in places if _ends_by_emoji(bare, p)}
    # pysbd uses rare letters and signs as marks of its own: hand it stand-ins of the same length
    masked = _FOREIGN.sub(lambda m: "X" if m.group().isupper() else "x", bare)
    at = 0
    for piece in _segmenter().segment(masked):
        at = max(at, masked.find(piece, at) + len(piece))
        found.add(len(bare[:at].rstrip()))
    ends = []
    for end in sorted(found):
        closing, next_word = _AFTER_END.match(bare, end).groups()
        end += len(closing)
        if closing and next_word:  # a quotation inside a sentence
            continue
        if not _WORD.search(bare, end):  # nothing more is said
            break
        if _WORD.search(bare, ends[-1] if ends else 0, end):
            ends.append(end)
        elif ends:
            ends[-1] = max(ends[-1], end)
    return [*ends, len(bare)]


def _ends_by_emoji(bare, place):
    """Whether an emoji there stands for a full stop: a word before it, a capital after ("so happy 😄 I like it").

    Not after a subject ("I ❤️ NY"), where it stands for the verb.
    """
    before = bare[:place]
    return bool(_LAST_WORD.search(before) and not _SUBJECT.search(before) and _CAPITAL.match(bare, place))
