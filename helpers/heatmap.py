"""A story as running text, every token on the colour of its signed value: as a matplotlib figure and as HTML.

Values are red where positive (helpful), blue where negative (harmful), white at zero. A value colours its own token t;
in training-token attributions that is the input which predicts token t + 1, and captions say so.
"""

import html
import re
from functools import lru_cache
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.path import Path
from matplotlib.textpath import TextPath, text_to_path

LINE = 1.6  # pitch of lines of text, in font sizes
SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")  # </s>, <|endoftext|>, [PAD]


def tokens_of(tokenizer, ids):
    """The text of each token id, so that joined they are the decoded text: special tokens and spaces included.

    A character that several tokens spell (bytes) belongs to the last of them; those before it are empty strings.
    """
    texts, done = [], ""
    ids = [int(i) for i in ids]
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        text = text if end == len(ids) else text.rstrip("\ufffd")  # an unfinished character: wait for its last byte
        texts.append(text[len(done) :])
        done = text if len(text) > len(done) else done
    return texts


class Panel(NamedTuple):
    """One story of a token figure. values: one a token, or None for plain text; span: tokens [first, last) to mark."""

    title: str
    tokens: list
    values: object = None
    span: tuple = None


def token_figure(panels, vmax=None, label="influence (nats)", width=6.4, size=7.5):
    """A figure as high as its text: one heat map a Panel, below each other, on one scale with one colour bar.

    vmax: the half-range of all panels, by default their largest absolute value. width in inches, size in points.
    """
    panels = [Panel(*panel) for panel in panels]
    valued = [_numbers(panel.values) for panel in panels if panel.values is not None]
    vmax = vmax or max((np.nanmax(np.abs(values), initial=0.0) for values in valued), default=0.0) or 1.0
    line, margin = LINE * size / 72, 0.1
    lines = [_lay_out(panel.tokens, (width - 2 * margin) * 72, size)[1] for panel in panels]
    heads = [1.5 + panel.title.count("\n") if panel.title else 0.5 for panel in panels]
    bar = 0.55 if valued else 0.0
    height = bar + sum(lines + heads) * line + margin
    fig = plt.figure(figsize=(width, height), layout="none")
    top = height - margin / 2
    for panel, n_lines, head in zip(panels, lines, heads):
        top -= (n_lines + head) * line
        box = (margin / width, top / height, 1 - 2 * margin / width, n_lines * line / height)
        ax = token_heatmap(fig.add_axes(box), panel.tokens, panel.values, vmax, panel.span, size)
        title = "\n".join(map(_shown, panel.title.split("\n")))
        ax.set_title(title, fontsize=size + 0.5, fontweight="bold", pad=0.2 * size, loc="left")
    if valued:
        _bar(fig, fig.add_axes((0.3, 0.4 / height, 0.4, 0.09 / height)), vmax, valued, label, size)
    return fig


def token_heatmap(ax, tokens, values=None, vmax=None, span=None, size=7.5):
    """One story as running text on `ax`, every token on the colour of its signed value; returns ax.

    tokens: strings as tokens_of gives them; values: one a token (NaN: no colour), or None for plain text; vmax: the
    value of full colour, by default the largest absolute one: give the same to panels that are compared; span: tokens
    [first, last) to underline; size: of the type in points, less if the text would not fit. A newline shows as ↵ and
    breaks the line, special tokens are faint. The text is drawn as paths in the axes' own units, so it keeps to its
    boxes if the axes is resized later. ValueError if there are not as many values as tokens.
    """
    values = np.full(len(tokens), np.nan) if values is None else _numbers(values)
    if len(values) != len(tokens):
        raise ValueError(f"values must be one a token: {len(values)} values for {len(tokens)} tokens")
    width, height = 72 * ax.get_figure().get_size_inches() * ax.get_position().size
    boxes, n_lines = _lay_out(tokens, width, size)
    while n_lines * LINE * size > height * 1.001 and size > 2:
        size *= 0.95
        boxes, n_lines = _lay_out(tokens, width, size)
    colours = _colours(values, vmax)
    corners = [_rectangle(box, size) for box in boxes]
    ax.add_collection(PolyCollection(corners, facecolors=colours[[box.token for box in boxes]], linewidths=0))
    for faces, ink in _inks(boxes, colours, size).items():
        ax.add_collection(PathCollection(ink, facecolors=faces, linewidths=0, snap=False))
    if span is not None:
        marked = [c for c, box in zip(corners, boxes) if span[0] <= box.token < span[1]]
        ax.add_collection(LineCollection([[c[3], c[2]] for c in marked], colors="black", linewidths=1.3))
    ax.set(xlim=(0, width), ylim=(n_lines * LINE * size, 0), aspect="equal", anchor="NW")
    ax.axis("off")
    return ax


class _Box(NamedTuple):
    token: int
    line: int
    x: float
    width: float
    text: str


def _lay_out(tokens, width, size):
    """([_Box], number of lines): tokens set as running text. Lines break at spaces and newlines, never inside a word
    that fits on a line; the space before a word that opens a line is dropped, and a ↵ hangs into the margin."""
    boxes, line, x, width = [], 0, 0.0, width - _advance("↵", size)
    word_ends = [i for i in range(1, len(tokens)) if tokens[i][:1].isspace() or tokens[i - 1][-1:].isspace()]
    starts = dict(zip([0, *word_ends], [*word_ends, len(tokens)]))
    for i, token in enumerate(tokens):
        rest = sum(_advance(_shown(t.rstrip("\n")), size) for t in tokens[i : starts.get(i, i + 1)])
        if x and x + rest > width and (i in starts or x + _advance(_shown(token), size) > width) and token.strip("\n"):
            line, x = line + 1, 0.0
        text = _shown(token) if x else _shown(token).lstrip(" ") or _shown(token)
        step = max(_advance(text, size), 0.25 * size)  # a token without text of its own still shows its colour
        boxes.append(_Box(i, line, x, step, text))
        x += step
        if "\n" in token:
            line, x = line + token.count("\n"), 0.0
    return boxes, (boxes[-1].line + 1 if boxes else 1)


def _shown(token):
    """What is drawn for a token: ↵ for newlines, □ for what the font lacks or draws nothing for (so that no text hides
    behind zero-width characters), and no mathematics between dollars."""
    text = token.replace("\r", "").replace("\n", "↵").replace("\t", "  ")
    return "".join(c if _has_ink(c) else "□" for c in text).replace("$", r"\$")


@lru_cache(maxsize=100_000)
def _has_ink(character):
    """Whether the font draws it; blanks count as drawn."""
    font = FontProperties(family="DejaVu Sans")
    if not get_font(findfont(font)).get_char_index(ord(character)):
        return False
    return character.isspace() or len(text_to_path.get_text_path(font, character)[1]) > 0


def _advance(text, size):
    """Width of a text in points with its outer spaces, which the renderer's own measure drops."""
    return size / 10 * (_measure(f"|{text}|") - _measure("||"))


@lru_cache(maxsize=100_000)
def _measure(text):
    font = FontProperties(family="DejaVu Sans", size=10)
    return text_to_path.get_text_width_height_descent(text.replace(r"\$", "$"), font, False)[0]


def _rectangle(box, size):
    """Four corners of a token's background, clockwise from the upper left, in points; y grows downwards."""
    top, gap = (box.line + 0.12) * LINE * size, 0.04 * size  # the gap lets the pieces of a word be told apart
    right, bottom = box.x + box.width - gap, top + 0.86 * LINE * size
    return [(box.x, top), (right, top), (right, bottom), (box.x, bottom)]


def _inks(boxes, colours, size):
    """{colour of the ink: [glyph paths]}: white on dark backgrounds, grey for ↵ and special tokens on light ones."""
    inks = {"black": [], "white": [], "#8c8c8c": []}
    for box in boxes:
        word = box.text.strip()
        if not word:
            continue
        faint = SPECIAL.fullmatch(word) or set(word) == {"↵"}
        light = _lightness(colours[box.token])
        glyphs = TextPath((0, 0), word, size=size, prop=FontProperties(family="DejaVu Sans"))
        indent = _advance(box.text[: box.text.index(word)], size)
        vertices = glyphs.vertices * (1, -1) + (box.x + indent, (box.line + 0.73) * LINE * size)
        ink = "white" if light < 0.42 else "#8c8c8c" if faint and light > 0.8 else "black"
        inks[ink].append(Path(vertices, glyphs.codes))
    return inks


def _lightness(colour):
    """Perceived lightness of RGBA on white, 0 to 1 (the weights of Rec. 709)."""
    red, green, blue, alpha = colour
    return alpha * (0.2126 * red + 0.7152 * green + 0.0722 * blue) + 1 - alpha


def _numbers(values):
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=float)


def _colours(values, vmax):
    """RGBA of signed values, [n, 4]: RdBu_r centred at zero, full colour at ±vmax, transparent for NaN."""
    vmax = vmax or np.nanmax(np.abs(values), initial=0.0) or 1.0
    colours = plt.get_cmap("RdBu_r")(Normalize(-vmax, vmax)(np.nan_to_num(values)))
    colours[np.isnan(values), 3] = 0.0
    return colours


def _bar(fig, cax, vmax, valued, label, size):
    """The colour bar of a token figure, with pointed ends where values lie beyond ±vmax."""
    beyond = any((np.abs(values) > vmax * (1 + 1e-9)).any() for values in valued)
    mappable = plt.cm.ScalarMappable(Normalize(-vmax, vmax), "RdBu_r")
    bar = fig.colorbar(mappable, cax=cax, orientation="horizontal", extend="both" if beyond else "neither")
    bar.set_ticks([-vmax, 0, vmax], labels=[f"−{vmax:.3g}", "0", f"+{vmax:.3g}"])
    bar.ax.tick_params(labelsize=size - 0.5)
    bar.set_label(label, fontsize=size)


def token_html(tokens, values=None, vmax=None, span=None):
    """The twin of token_heatmap as one HTML element: a token's value is its tooltip, the text is escaped."""
    values = np.full(len(tokens), np.nan) if values is None else _numbers(values)
    if len(values) != len(tokens):
        raise ValueError(f"values must be one a token: {len(values)} values for {len(tokens)} tokens")
    spans = []
    for i, (token, value, colour) in enumerate(zip(tokens, values, _colours(values, vmax))):
        red, green, blue = (int(round(255 * c)) for c in colour[:3])
        ink = "#fff" if _lightness(colour) < 0.42 else "#000"
        style = "" if np.isnan(value) else f"background:rgb({red},{green},{blue});color:{ink}"
        style += ";border-bottom:2px solid #000" if span and span[0] <= i < span[1] else ""
        title = "" if np.isnan(value) else f' title="{value:+.3g}"'
        text = html.escape(token).replace("\n", "↵<br>")
        spans.append(f'<span style="{style}"{title}>{text}</span>')
    return f'<div style="font-family:sans-serif;line-height:1.7;white-space:pre-wrap">{"".join(spans)}</div>'
