"""The definition of an emoji, by example and by property."""

import math

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import emojis

PICTURES = ["😄", "👨‍👩‍👧", "🏳️‍🌈", "🇩🇪", "1️⃣", "#️⃣", "❤️", "☺️", "✅", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👍🏽", "☝🏽", "👩🏾‍🚀", "⌚"]
TEXTS = ["©", "™", "®", "☺", "❤", "☎", "5", "#", "*", "é", "中", "🇩", "⌚\ufe0e", "…", ":-)", ""]


@pytest.mark.parametrize("emoji", PICTURES)
def test_each_picture_is_one_emoji(emoji):
    assert emojis.find(f"so {emoji} it is") == [emoji]
    assert emoji in emojis.tokens(f"so {emoji} it is")


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_not_an_emoji(text):
    assert emojis.find(f"so {text} it is") == []


@given(st.lists(st.sampled_from(PICTURES), max_size=6), st.text(alphabet="abc é.,!", max_size=8))
def test_every_emoji_is_counted_once_and_in_order(sequence, between):
    assert emojis.find(between.join(["", *sequence, ""])) == sequence


@given(
    st.sampled_from(["👍", "👋", "🙏", "🧑", "✊"]),
    st.sampled_from(["", "🏻", "🏼", "🏽", "🏾", "🏿"]),
    st.integers(1, 5),
)
def test_counts_do_not_depend_on_skin_tone(base, tone, times):
    assert len(emojis.find(f"well {(base + tone) * times} done")) == times


@given(st.text())
def test_tokens_lie_where_their_spans_say(text):
    for token, (start, end) in emojis.spans(text):
        assert text[start:end] == token


def test_plain_words_keep_apostrophes_and_lose_punctuation():
    assert emojis.tokens("It's well-known, isn't it?") == ["It's", "well-known", "isn't", "it"]


# Sentences. Each of these is one, and stays one among others.
SENTENCES = [
    "I love it!",
    "Dr. Smith and Mrs. Jones agree with us.",
    "We met at 5 p.m. in the U.S. embassy.",
    "It costs 3.50 dollars, e.g. in Rome.",
    "I don't know... maybe so.",
    "Really?!",
    "Wow!!!",
    'She said "fine" and left (early).',
    "今日はとても楽しい。",
    "मुझे यह पसंद है।",
    "هل هذا جيد؟",
    "Ça va très bien.",
    "Prices of ♥ and © rose by 5 %.",
]
HANDS = ["👍", "👋", "☝️", "👩‍🚀", ""]
RUN = st.lists(st.sampled_from(PICTURES), max_size=3)
GAP = st.sampled_from(["", " ", "  "])


def squeezed(text):
    """A text without emojis and white space."""
    return "".join("".join(g for g in regex.findall(r"\X", text) if not emojis.is_emoji(g)).split())


@settings(deadline=None)  # the first example loads pysbd
@given(st.lists(st.tuples(st.sampled_from(SENTENCES), RUN, GAP), min_size=1, max_size=6), RUN)
def test_emojis_after_sentences_belong_to_them_and_change_no_count(parts, first):
    plain = emojis.attach(" ".join(s for s, _, _ in parts))
    assert plain == [(s, []) for s, _, _ in parts]
    text = " ".join(["".join(first), *(s + gap + "".join(run) for s, run, gap in parts)])
    expected = [(s, run) for s, run, _ in parts]
    expected[0] = (expected[0][0], first + expected[0][1])
    assert emojis.attach(text) == expected


TEXT_OR_EMOJI = st.one_of(st.text(max_size=6), st.sampled_from([*PICTURES, *TEXTS, *SENTENCES, "\n", " ", '."', "ȸ∯."]))


@settings(deadline=None)  # the first example loads pysbd
@given(st.lists(TEXT_OR_EMOJI, max_size=12).map("".join))
def test_nothing_is_lost_whatever_the_text(text):
    found = emojis.attach(text)
    assert squeezed("".join(s for s, _ in found)) == squeezed(text)
    assert [e for _, own in found for e in own] == emojis.find(text)
    assert bool(found) == bool(text.strip())
    assert all(s == s.strip() for s, _ in found)
    assert len(found) == 1 or all(regex.search(r"[\p{L}\p{N}]", s) for s, _ in found)


@settings(deadline=None)  # the first example loads pysbd
@given(st.lists(TEXT_OR_EMOJI, max_size=12).map("".join))
def test_places_run_from_0_to_1_in_order(text):
    sentences, marks = emojis.locate(text)
    places = [place for _, _, place in marks]
    if len(squeezed(text)):
        assert places == sorted(places)
        assert all(0 <= p <= 1 for p in places)
    else:
        assert all(map(math.isnan, places))
    assert all(0 <= index < len(sentences) for _, index, _ in marks)


@settings(deadline=None)  # the first example loads pysbd
@given(
    st.lists(
        st.tuples(st.sampled_from(SENTENCES), st.sampled_from(["👍", "👋", "☝️", "👩‍🚀", ""])), min_size=1, max_size=4
    ),
    st.sampled_from("🏻🏼🏽🏾🏿"),
)
def test_ratios_do_not_depend_on_skin_tone(parts, tone):
    toned = [(s, e and e[0] + tone + e[1:].replace("\ufe0f", "")) for s, e in parts]
    plain, other = (emojis.attach(" ".join(f"{s} {e}" for s, e in p)) for p in (parts, toned))
    assert [s for s, _ in plain] == [s for s, _ in other]
    assert [own for _, own in plain] == [[emojis.toneless(e) for e in own] for _, own in other]


@pytest.mark.parametrize("emoji", PICTURES)
def test_without_its_tone_an_emoji_is_still_one(emoji):
    plain = emojis.toneless(emoji)
    assert emojis.find(plain) == [plain]
    assert emojis.toneless(plain) == plain


CASES = {
    "I love it! 😄 Dr. Smith agrees.": [("I love it!", ["😄"]), ("Dr. Smith agrees.", [])],
    "so happy 😄😄 I like it": [("so happy", ["😄", "😄"]), ("I like it", [])],
    "so happy 😄 that I like it": [("so happy that I like it", ["😄"])],
    "I ❤️ NY. We 💛 Rome": [("I NY.", ["❤️"]), ("We Rome", ["💛"])],
    "🎉 Hello. World": [("Hello.", ["🎉"]), ("World", [])],
    "🎉😄👍🏽": [("", ["🎉", "😄", "👍🏽"])],
    " 🎉 \n": [("", ["🎉"])],
    "": [],
    " \n ": [],
    "Fun 🎉!": [("Fun!", ["🎉"])],
    "Fun!🎉Then home": [("Fun!", ["🎉"]), ("Then home", [])],
    'He said "wow! 😄" Then he left.': [('He said "wow!"', ["😄"]), ("Then he left.", [])],
    "one line 😄\nand another\n🎉 a third": [("one line", ["😄"]), ("and another", ["🎉"]), ("a third", [])],
    "楽しい。😄「はい。」と言った。": [("楽しい。", ["😄"]), ("「はい。」と言った。", [])],
    "अच्छा है। 🙏 धन्यवाद॥": [("अच्छा है।", ["🙏"]), ("धन्यवाद॥", [])],
    "Well… I think so. 🤔": [("Well…", []), ("I think so.", ["🤔"])],
    "well… I mean well... 😢 maybe": [("well…", []), ("I mean well... maybe", ["😢"])],
    "No!!! Not me 😭 !!!": [("No!!!", []), ("Not me !!!", ["😭"])],
    "Old ☺ and © stay text.": [("Old ☺ and © stay text.", [])],
    "It amazes me. I stay 😄. Why?": [("It amazes me.", []), ("I stay.", ["😄"]), ("Why?", [])],
    "Odd ∯ sign. Next ȸ here 😄.": [("Odd ∯ sign.", []), ("Next ȸ here.", ["😄"])],
    "Wow! 🎉 ... 🎉 !!! Then home.": [("Wow! ... !!!", ["🎉", "🎉"]), ("Then home.", [])],
    "?!": [("?!", [])],
}


@pytest.mark.parametrize("text", CASES)
def test_sentences_and_their_emojis_by_example(text):
    assert emojis.attach(text) == CASES[text]
