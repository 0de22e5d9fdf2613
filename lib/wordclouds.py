"""Word clouds that keep emojis. WordCloud's own tokeniser drops them and its fonts cannot draw them."""

from collections import Counter

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageFont
from wordcloud import STOPWORDS, WordCloud

from lib import big5, emojis, style

SIZE = (900, 560)  # pixels
SHADES = (1.0, 0.82, 0.66)  # of the trait colour, to set neighbours apart; the lightest still reads on white
_FONT = font_manager.findfont("DejaVu Sans")
_BIT = ("\u200b", "\u200c")  # two characters without width, to tell placeholders apart


def frequencies(texts, skip=()):
    """Counts of words (lower case, stop words left out) and emojis over texts."""
    skip = STOPWORDS | {s.lower() for s in skip}
    counts = Counter(t.lower() for text in texts for t in emojis.tokens(text))
    return Counter({t: n for t, n in counts.items() if emojis.is_emoji(t) or (len(t) > 2 and t not in skip)})


def _placeholder(number):
    """A block that keeps an emoji's room in the cloud, different for each number."""
    return "\u2588\u2588" + "".join(_BIT[int(b)] for b in f"{number:b}")


def _colours(colour, hidden, seed):
    rng = np.random.default_rng(seed)
    rgb = np.array(mpl.colors.to_rgb(colour))

    def pick(word, **_):
        shade = rng.choice(SHADES)
        return "white" if word in hidden else mpl.colors.to_hex(1 - shade * (1 - rgb * 0.85))

    return pick


def _paste(image, picture, label, size, position):
    left, top, right, bottom = ImageFont.truetype(_FONT, size).getbbox(label)
    scaled = picture.copy()
    scaled.thumbnail((right - left, bottom - top), Image.LANCZOS)
    x = position[1] + (right - left - scaled.width) // 2  # WordCloud draws the ink of a word at its position,
    y = position[0] + (bottom - top - scaled.height) // 2  # without the font's own offset
    image.alpha_composite(scaled, (max(0, x), max(0, y)))


def draw(ax, counts, colour, words=90, seed=0):
    """Draw counts {token: weight} as a cloud on the axes; sizes follow the weights, emojis are pictures.

    Where no colour emoji font is installed an emoji appears as its `:name:`. Returns the labels drawn.
    """
    chosen = dict(Counter(counts).most_common(words))
    pictures = {t: style.emoji_picture(t) for t in chosen if emojis.is_emoji(t)}
    hidden = {_placeholder(i): t for i, t in enumerate(pictures) if pictures[t] is not None}
    label = {t: style.emoji_name(t) for t in pictures} | {t: p for p, t in hidden.items()}
    cloud = WordCloud(
        font_path=_FONT,
        width=SIZE[0],
        height=SIZE[1],
        background_color="white",
        prefer_horizontal=1.0,
        relative_scaling=0.5,
        max_font_size=110,
        random_state=seed,
        margin=6,
        color_func=_colours(colour, hidden, seed),
    ).generate_from_frequencies({label.get(t, t): n for t, n in chosen.items()})
    image = cloud.to_image().convert("RGBA")
    for (word, _), size, position, _, _ in cloud.layout_:
        if word in hidden:
            _paste(image, pictures[hidden[word]], word, size, position)
    ax.imshow(np.asarray(image), interpolation="bilinear")
    ax.set_axis_off()
    return [hidden.get(word, word) for (word, _), *_ in cloud.layout_]


def panels(clouds, words, seed):
    """A figure with one cloud a trait, each in the trait's colour. clouds: {trait: {token: weight}}."""
    rows = -(-len(clouds) // 3)
    fig, axes = plt.subplots(rows, min(3, len(clouds)), figsize=(11, 2.7 * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (trait, weights) in zip(axes.flat, clouds.items(), strict=False):
        draw(ax, weights, big5.COLOURS[trait], words, seed)
        ax.set_title(trait.capitalize(), color=big5.COLOURS[trait], fontweight="bold")
    return fig
