"""Saving figures, setting text, colouring tokens."""

import html
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import heatmap, plots
from helpers.plots import (
    Panel,
    plot_intervals,
    save_figure,
    show_matrix,
    token_figure,
    token_heatmap,
    token_html,
    tokens_of,
)

STORIES260K = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of its own, full mode, bundled source, and a figure in it."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(plots, "__file__", str(tmp_path / "helpers" / "plots.py"))
    monkeypatch.chdir(tmp_path / "notebooks")
    for name in ("FAST", "TINYSTORIES", "STORIES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def line_figure():
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    return fig


def test_save_figure_writes_the_same_bytes_and_names_no_machine(root):
    path = save_figure(line_figure(), "06_spectra")
    assert str(path) == "../figures/06_spectra.png" and path.exists()
    first = path.read_bytes()
    assert save_figure(line_figure(), "06_spectra").read_bytes() == first
    assert b"matplotlib" not in first.lower() and b"tIME" not in first


@pytest.mark.parametrize("variable, value, folder", [
    ("TINYSTORIES", "hub", "out"), ("STORIES", "some/folder", "out"), ("TINYSTORIES", "bundled", "figures"),
])  # fmt: skip
def test_save_figure_keeps_other_sources_out_of_figures(root, monkeypatch, variable, value, folder):
    monkeypatch.setenv(variable, value)
    assert save_figure(line_figure(), "x") == Path("..") / folder / "x.png"
    assert [path.name for path in root.iterdir() if path.name in ("out", "figures")] == [folder]


def test_save_figure_leaves_the_layout_of_a_token_figure(root):
    plt.style.use("helpers.influence")  # which switches constrained layout on
    fig = token_figure([Panel("one", ["Once", " upon"], [0.1, -0.2], None)])
    before = [ax.get_position().bounds for ax in fig.axes]
    save_figure(fig, "x")
    fig.draw_without_rendering()
    assert [ax.get_position().bounds for ax in fig.axes] == before


def test_save_figure_in_fast_mode_writes_nothing(root, monkeypatch):
    monkeypatch.setenv("FAST", "1")
    assert save_figure(line_figure(), "x") is None
    assert not (root / "figures").exists()


@pytest.mark.parametrize("name", ["a/b", "../x", "x.png", ""])
def test_save_figure_refuses_paths(root, name):
    with pytest.raises(ValueError, match="name=.* must be letters, digits, _ and -"):
        save_figure(line_figure(), name)


def test_packaged_style_loads():
    with plt.style.context("helpers.influence"):
        assert plt.rcParams["figure.figsize"][0] == 6.4
        cycle = [color.lower() for color in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    meanings = [color.lower().lstrip("#") for color in plots.COLORS.values()]
    assert len(set(meanings)) == len(meanings)
    assert [color.lstrip("#") for color in cycle[:3]] == meanings[1:4]


def byte_level(texts):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


BYTES = byte_level(["Once upon a time there was a girl. She liked jam."])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_tokens_join_to_the_decoded_text(text):
    ids = BYTES(text).input_ids
    tokens = tokens_of(BYTES, ids)
    assert len(tokens) == len(ids) and "".join(tokens) == text


def test_a_character_of_several_tokens_belongs_to_the_last():
    assert tokens_of(BYTES, torch.tensor(BYTES("é€").input_ids)) == ["", "é", "", "", "€"]
    assert tokens_of(BYTES, BYTES("€").input_ids[:2])[-1] != "", "an unfinished character at the end shows as such"


@pytest.mark.skipif(not STORIES260K.exists(), reason="needs ../shared/data/stories260k")
def test_tokens_of_a_sentencepiece_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(STORIES260K)
    text = "Once upon a time, there was a café.\nThe end…"
    tokens = tokens_of(tokenizer, tokenizer(text).input_ids)
    assert tokens[0] == "<s>" and "".join(tokens[1:]).strip() == text
    assert not any("▁" in token or "<0x" in token for token in tokens)


WORDS = st.lists(st.sampled_from([" the", " cat", "s", "x" * 12, "\n", " ", "", ".", "\n\n", "</s>", " ü"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_layout_keeps_every_token_once_in_order_without_overlap(tokens):
    width = 150.0
    boxes, n_lines = heatmap._lay_out(tokens, width, 8)
    assert [box.token for box in boxes] == list(range(len(tokens)))
    assert boxes[-1].line == n_lines - 1
    for before, after in zip(boxes, boxes[1:]):
        if after.line == before.line:
            assert after.x == pytest.approx(before.x + before.width)
        else:
            assert after.line > before.line and after.x == 0
    assert all(box.x + box.width < width + 8 or box.x == 0 for box in boxes)


def test_layout_breaks_between_words_and_at_newlines():
    tokens = ["One", " two", " thr", "ee", ".\n", "Four"]
    wide = [box.line for box in heatmap._lay_out(tokens, 500, 8)[0]]
    assert wide == [0, 0, 0, 0, 0, 1]
    narrow = heatmap._advance("One two thr", 8) + 1
    boxes, _ = heatmap._lay_out(tokens, narrow, 8)
    assert [box.line for box in boxes] == [0, 0, 1, 1, 1, 2], "the word of two tokens moves as a whole"
    assert boxes[2].text == "thr", "a line does not open with a space"


def test_colours_are_signed_and_centred_at_zero():
    red, white, blue = heatmap._colours(np.array([2.0, 0.0, -2.0]), vmax=2.0)[:, :3]
    assert red[0] > red[2] and blue[2] > blue[0] and white.min() > 0.95
    np.testing.assert_allclose(heatmap._colours(np.array([9.0]), 2.0), heatmap._colours(np.array([2.0]), 2.0))
    assert heatmap._colours(np.array([np.nan, 1.0]), None)[0, 3] == 0
    assert heatmap._colours(np.zeros(3), None)[:, :3].min() > 0.95, "all zero is white, not an error"


def test_token_figure_shares_one_scale_and_is_as_high_as_its_text():
    one = Panel("a", ["<s>", " Once", " upon", "\n", "$x$", ""], torch.tensor([0.0, 1, -4, 2, float("nan"), 1]), (1, 3))
    fig = token_figure([Panel("query", ["Who", "?"]), one, ("b", [" a"], [0.5])], label="score")
    heat = [ax.collections[0].get_facecolor() for ax in fig.axes[:3]]
    np.testing.assert_allclose(heat[1][2], heatmap._colours(np.array([-4.0]), 4.0)[0])
    np.testing.assert_allclose(heat[2][0], heatmap._colours(np.array([0.5]), 4.0)[0])
    assert heat[0][0, 3] == 0, "plain text has no colour"
    assert fig.axes[3].get_xlabel() == "score" and fig.get_figwidth() == 6.4
    more = token_figure([one._replace(tokens=[" word"] * 300, values=np.ones(300))])
    assert more.get_figheight() > fig.get_figheight()
    fig.canvas.draw()


def test_token_heatmap_fits_a_small_axes_and_checks_lengths():
    fig, ax = plt.subplots(figsize=(2, 1))
    assert token_heatmap(ax, [" word"] * 200, np.linspace(-1, 1, 200)) is ax
    with pytest.raises(ValueError, match="2 values for 1 tokens"):
        token_heatmap(ax, ["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="2 values for 1 tokens"):
        token_html(["a"], [1.0, 2.0])


def test_token_html_escapes_and_tells_the_numbers():
    page = token_html(["<s>", ' "&', "\n", "x"], [1.0, -0.25, 0.0, float("nan")], vmax=1.0, span=(1, 2))
    assert "<s>" not in page and "&lt;s&gt;" in page and "&quot;&amp;" in page and "↵<br>" in page
    assert re.findall(r'title="([^"]*)"', page) == ["+1", "-0.25", "+0"]
    assert page.count("border-bottom") == 1
    inner = re.sub(r"<br>", "\n", page).replace("↵", "")
    assert html.unescape(re.sub(r"</?(?:span|div)[^>]*>", "", inner)) == '<s> "&\nx'
    assert html.escape("'") in token_html(["'"])


def test_show_matrix_is_centred_and_labelled():
    fig, ax = plt.subplots()
    assert show_matrix(ax, torch.tensor([[1.0, -3.0], [0.0, 2.0]]), "covariance") is ax
    assert ax.images[0].get_clim() == (-3.0, 3.0)
    assert fig.axes[1].get_ylabel() == "covariance"


def test_plot_intervals_takes_the_methods_colour_and_refuses_disorder():
    ax = plot_intervals(plt.subplots()[1], [1, 2], [0.1, 0.2], [0.2, 0.3], [0.4, 0.5], "EK-FAC")
    assert ax.containers[0].lines[0].get_color() == plots.COLORS["EK-FAC"]
    assert ax.get_legend_handles_labels()[1] == ["EK-FAC"]
    with pytest.raises(ValueError, match="low, middle, high"):
        plot_intervals(ax, [1], [0.5], [0.2], [0.4], "EK-FAC")
