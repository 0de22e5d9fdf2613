"""One look and one `save` for every figure and table.

A figure is saved as PNG, PDF and the CSV behind it, a table as CSV, Markdown and LaTeX, all under
`figures/<profile>/NN_name.*`; `NN_name.json` keeps caption and paper reference for the gallery.
"""

import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from lib import big5, paths, profiles
from lib.artifacts import replacing

INK = "#333333"
GREY = "#767676"
MODELS = {"tfidf": "#56B4E9", "encoder": "#000000"}  # method colours, apart from the trait colours
EMOJI_SIZE = 109  # the only size Noto Color Emoji holds
EMOJI_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
)


def apply():
    """Set the look of all figures that follow."""
    # seaborn draws the whole figure once for every heat map, to see whether labels overlap; ours are set by hand
    sns.matrix._draw_figure = lambda figure: None
    sns.set_theme(context="notebook", style="whitegrid", font="DejaVu Sans")
    mpl.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.edgecolor": GREY,
            "text.color": INK,
            "axes.labelcolor": INK,
            "pdf.fonttype": 42,
        }
    )


def emoji_font():
    """Path of Noto Color Emoji, or None; the variable EMOJI_FONT may name it."""
    for path in (os.environ.get("EMOJI_FONT", ""), *EMOJI_FONTS):
        if path and os.path.exists(path):
            return path
    return None


def emoji_picture(grapheme):
    """An RGBA picture of an emoji, or None where no colour emoji font is installed."""
    path = emoji_font()
    if path is None:
        return None
    font = ImageFont.truetype(path, EMOJI_SIZE)
    picture = Picture.new("RGBA", (150, 150), (0, 0, 0, 0))
    ImageDraw.Draw(picture).text((4, 10), grapheme, font=font, embedded_color=True)
    box = picture.getbbox()
    return picture.crop(box) if box else None


def emoji_name(grapheme):
    """`:name:` of an emoji, for fonts that lack it."""
    import emoji

    return emoji.demojize(grapheme)


def place_emoji(ax, grapheme, xy, zoom=0.2):
    """Put an emoji on the axes at data coordinates: a picture, or its name, never an empty box."""
    picture = emoji_picture(grapheme)
    if picture is None:
        return ax.annotate(emoji_name(grapheme), xy, ha="center", va="center", fontsize=7)
    return ax.add_artist(AnnotationBbox(OffsetImage(picture, zoom=zoom), xy, frameon=False))


def emoji_ticks(ax, labels):
    """Label the y axis 0, 1, 2 ... with tokens; emojis as pictures, or as `:name:` without a font."""
    import matplotlib.transforms as transforms

    from lib.emojis import is_emoji

    pictures = {i: emoji_picture(t) for i, t in enumerate(labels) if is_emoji(t)}
    text = ["" if pictures.get(i) else emoji_name(t) if i in pictures else t for i, t in enumerate(labels)]
    ax.set_yticks(range(len(labels)), text)
    place = transforms.blended_transform_factory(ax.transAxes, ax.transData)
    for i, picture in pictures.items():
        if picture is not None:
            box = AnnotationBbox(OffsetImage(picture, zoom=0.1), (-0.06, i), xycoords=place, frameon=False)
            ax.add_artist(box)


def trait_axis(traits):
    """Labels and colours for the given traits in their usual order: two lists."""
    names = big5.ordered(traits)
    return [n.capitalize() for n in names], [big5.COLOURS[n] for n in names]


@dataclass
class Saver:
    """`save(what, name, caption, paper)` for one notebook under one profile."""

    notebook: str  # "01_dataset"
    settings: object  # profiles.Settings
    named: dict = field(default_factory=dict)  # results kept so far

    @property
    def folder(self):
        return paths.FIGURES / self.settings.profile

    @property
    def command(self):
        """The command that makes this notebook's figures, for a shell; files are named without their folder."""
        words = ["./run_all.sh", f"--profile {self.settings.profile}", f"--only {self.notebook[:2]}"]
        words += [f"--seed {self.settings.seed}"] if self.settings.seed else []
        for key, value in self.settings.overrides.items():
            if key.partition(".")[0] in profiles.PLACED:
                value = _without_folders(value)
            words.append(f"--set {shlex.quote(f'{key}={_typed(value)}')}")
        return " ".join(words)

    def __call__(self, what, name, caption, paper, data=None):
        """Save a figure (with the numbers behind it in `data`) or a table under `NN_name`, and show it.

        what: matplotlib Figure, or DataFrame without a meaningful index. paper: the section, figure or table
        of the paper that it answers to. The profile's `about` is added to every caption.
        """
        stem = f"{self.notebook[:2]}_{name}"
        is_table = not isinstance(what, mpl.figure.Figure)
        if is_table:
            self._table(what, stem)
        else:
            self._figure(what, stem, data)
        caption = " ".join(f"{caption} {self.source} {self.settings.about}".split())
        meta = {
            "kind": "table" if is_table else "figure",
            "notebook": self.notebook,
            "caption": caption,
            "paper": paper,
            "command": self.command,
        }
        with replacing(self.folder / f"{stem}.json") as tmp:
            tmp.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", "utf-8")
        display(Markdown(f"*{caption}* ({paper})"))

    @property
    def source(self):
        """Which opinions the numbers are about, when they are not the profile's own."""
        files = [str(v) for k, v in self.settings.overrides.items() if k in ("opinions.train", "opinions.test")]
        hub = self.settings.opinions.hub_id if self.settings.opinions.source == "hub" else None
        given = hub or ", ".join(os.path.basename(f) for f in files)
        return f"Data: {given}, in place of the profile's own." if given else ""

    def values(self, **named):
        """Keep named results, for tests and for text elsewhere, in results/<profile>/NN_notebook.values.json."""
        path = paths.RESULTS / self.settings.profile / f"{self.notebook}.values.json"
        self.named |= named
        plain = {k: v.item() if hasattr(v, "item") else v for k, v in self.named.items()}
        with replacing(path) as tmp:
            tmp.write_text(json.dumps(plain, indent=1), "utf-8")

    def _figure(self, figure, stem, data):
        figure.draw_without_rendering()  # lay out and measure once, for both files
        with mpl.rc_context({"figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)
        box = figure.get_tightbbox().padded(mpl.rcParams["savefig.pad_inches"])
        for ending, extra in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
            with replacing(self.folder / f"{stem}.{ending}") as tmp:
                figure.savefig(tmp, metadata=extra, bbox_inches=box)
        if data is not None:
            with replacing(self.folder / f"{stem}.csv") as tmp:
                data.to_csv(tmp, index=False, float_format="%.6g")
        saved = str(self.folder / f"{stem}.png")  # what is shown is what is saved
        display(Image(filename=saved, width=round(figure.get_figwidth() * 90)))
        plt.close(figure)

    def _table(self, table, stem):
        shown = table.map(_shown)
        with replacing(self.folder / f"{stem}.csv") as tmp:
            table.to_csv(tmp, index=False, float_format="%.6g")
        with replacing(self.folder / f"{stem}.md") as tmp:
            tmp.write_text(shown.to_markdown(index=False, disable_numparse=True) + "\n", "utf-8")
        with replacing(self.folder / f"{stem}.tex") as tmp:
            escaped = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
            escaped.to_latex(tmp, hrules=True)
        display(shown.style.hide(axis="index"))


def _without_folders(value):
    """A setting with the absolute paths in it cut down to their last part."""
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _typed(value):
    """A setting as `profiles.parse_override` reads it: plain text where that will do, else TOML."""
    if isinstance(value, str) and profiles.parse_override(f"key={value}")[1] == value:
        return value
    return _toml(value)


def _toml(value):
    """A value in TOML on one line: numbers, truth values, dates, texts, lists and tables of them."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(k)} = {_toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON leaves and TOML refuses
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml_key(name):
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _toml(name)


def _shown(value):
    """A table cell for reading: three decimals, none for whole numbers, nothing for a missing value."""
    if not isinstance(value, float):
        return value
    if value != value:
        return ""
    return f"{value:.0f}" if value.is_integer() and abs(value) >= 2 else f"{value:.3f}"


def wrap(labels, width=14):
    """Labels broken into lines, for narrow axes."""
    return [textwrap.fill(str(label), width, break_long_words=False) for label in labels]
