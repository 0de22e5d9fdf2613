"""The definition of an emoji, by example and by property."""

import pytest
from hypothesis import given
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
