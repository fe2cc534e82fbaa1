"""Figures of the series: colours with a meaning, saving, signed matrices, intervals; token heat maps by way of heatmap.

`plt.style.use("helpers.influence")` sets the packaged style. Signed values are red where positive, blue where negative.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch

from .heatmap import Panel, token_figure, token_heatmap, token_html, tokens_of

__all__ = [
    "COLORS", "Panel", "output_folder", "plot_intervals", "save_figure", "show_matrix", "token_figure",
    "token_heatmap", "token_html", "tokens_of",
]

COLORS = {  # Okabe and Ito's palette; one meaning each in every notebook
    "exact": "#000000",  # ground truth: exact influence, leave-one-out, retraining
    "EK-FAC": "#0072B2",
    "K-FAC": "#56B4E9",
    "gradient dot product": "#E69F00",
    "TF-IDF": "#009E73",
    "BM25": "#CC79A7",
    "LiSSA": "#D55E00",
    "diagonal": "#F0E442",
    "chance": "#999999",
}


def save_figure(fig, name):
    """Save figures/<name>.png, the same bytes for the same picture, and return its path relative to this folder. It is
    for the notebooks of this series; pictures of your own are saved by `fig.savefig("where/you/like.png")`.

    Fast mode (FAST=1) saves nothing and returns None. With a model or stories that are not the bundled ones
    (TINYSTORIES, STORIES), the file goes to out/, which git ignores. Both folders lie at the repository's root or,
    where helpers is installed without its repository, in the current folder. ValueError for a name that is a path.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name={name!r} must be letters, digits, _ and -, with no folder or ending: '06_spectra'")
    if os.environ.get("FAST") == "1":
        return None
    bundled = all(os.environ.get(key, "") in ("", "bundled") for key in ("TINYSTORIES", "STORIES"))
    path = output_folder("figures" if bundled else "out") / f"{name}.png"
    engine = fig.get_layout_engine()
    fig.savefig(path, metadata={"Software": None})
    if engine is None:
        fig.set_layout_engine("none")  # saving restores None as "what the style says", which would move token figures
    return Path(os.path.relpath(path))


def output_folder(name):
    """The folder `name` at the root of the repository, or in the current folder if there is none; made if missing."""
    root = Path(__file__).resolve().parents[1]
    folder = (root if (root / "pyproject.toml").exists() else Path.cwd()) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show_matrix(ax, matrix, label, vmax=None):
    """A signed matrix as an image on `ax`, RdBu_r centred at zero with a labelled colour bar; returns ax.

    matrix: [rows, columns], tensor or array; vmax: the half-range, by default its largest absolute value: give the
    same to panels that are compared.
    """
    matrix = np.asarray(matrix.detach().cpu() if isinstance(matrix, torch.Tensor) else matrix, dtype=float)
    vmax = vmax or np.abs(matrix).max() or 1.0
    beyond = "both" if np.abs(matrix).max() > vmax * (1 + 1e-9) else "neither"
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-vmax, vmax=vmax, aspect="auto", interpolation="nearest")
    ax.get_figure().colorbar(image, ax=ax, label=label, extend=beyond)
    return ax


def plot_intervals(ax, x, low, middle, high, method):
    """Estimates with intervals against x in the method's colour (a key of COLORS, also the legend's text); returns ax.

    low, middle, high: one number each per x, such as the 2.5th percentile, the mean and the 97.5th of a bootstrap.
    """
    low, middle, high = (np.asarray(values, dtype=float) for values in (low, middle, high))
    if not ((low <= middle) & (middle <= high)).all():
        raise ValueError("low, middle, high must be in this order everywhere, and no NaN among them")
    ax.errorbar(x, middle, [middle - low, high - middle], fmt="o-", color=COLORS[method], label=method)
    return ax
