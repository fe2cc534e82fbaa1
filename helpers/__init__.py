"""Influence functions for language models: exact, iterative and EK-FAC. Start with notebooks/06_ekfac_tinystories."""

from .batches import completions, token_span, tokenize
from .checks import check_close, pick
from .classifier import labelled_batches, load_classifier, load_labelled, train_classifier
from .damping import damping_sweep
from .ekfac import EKFACFactors, fit_ekfac
from .exact import exact_influence, ggn, hessian, hvp, leave_one_out
from .influence import influence, self_influence, sequence_gradients, top_k
from .layers import linear_layers
from .plots import save_figure
from .setup import check_setup, factor_bytes
from .solvers import Solution, arnoldi, cg, lissa, nystrom
from .sources import LM, load_facts, load_lm, load_stories
from .tasks import causal_lm, classification, regression

__all__ = [
    "EKFACFactors", "LM", "Solution", "arnoldi", "causal_lm", "cg", "check_close", "check_setup", "classification",
    "completions", "damping_sweep", "exact_influence", "factor_bytes", "fit_ekfac", "ggn", "hessian", "hvp",
    "influence", "labelled_batches", "leave_one_out", "linear_layers", "lissa", "load_classifier", "load_facts",
    "load_labelled", "load_lm", "load_stories", "nystrom", "pick", "regression", "save_figure", "self_influence",
    "sequence_gradients",
    "token_span", "tokenize", "top_k", "train_classifier",
]
