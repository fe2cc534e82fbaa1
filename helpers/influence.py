"""Influence scores: I(query, train) = Σ over layers of ⟨P(∇L_query), ∇L_train⟩. Positive = proponent."""

import hashlib
from functools import partial
from numbers import Integral

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .checkpoint import digest_of, job_of
from .ekfac import EKFACFactors, fingerprint, rotated_gradients
from .examples import by_length, check_targets
from .gradients import fastest_gradients, finite
from .layers import check_model, frozen, layer_shapes
from .output_tokens import output_token_scores
from .streaming import stream_scores
from .tasks import causal_lm
from .token_pairs import token_pair_scores

PER = ("sequence", "token", "output_token", "token_pair", "layer", ("layer", "token"))


def influence(model, factors, queries, train, task=causal_lm, damping=None, rank=None, per="sequence", progress=True,
              out=None):
    """Scores of every training example for every query, of summed losses (Grosse et al. 2023, section 2.1).

    Up-weighting example m by ε changes the query's loss by −ε I to first order; removal is ε = −1/N. On a *loss*, the
    up-weighting influence of Koh & Liang (2017) is −I. All layers of `factors` take part, and no other parameter.

    per: "sequence" [query, train]; "token" [query, train, seq], where [.., t] belongs to the position that reads token
    t and predicts t+1, 0 on pads; "output_token", the same shape, where [.., t] is what the loss *on* token t
    contributes, so the first is 0; "token_pair" [query, train, q_seq, seq], "token" on both sides; "layer" and
    ("layer", "token"): with a first axis for the layers of `factors`, in order. seq is the widest `input_ids`. Sums
    over tokens and layers give the sequence score.
    A layer that sees no tokens (a classifier on a pooled state) adds its score at position 0 of "token". The unit is
    nats per unit of ε, the dtype that of the gradients. P(∇L_q) of all queries is held at once, 4 bytes a weight and
    query; with `rank`, each layer's is cut to this rank by SVD, and 4 · rank · (d_out + d_in) are held (not with
    "token_pair"; "output_token" multiplies them out). damping: see EKFACFactors.ihvp. out: a .npy file that the scores
    are written to, block by block; what comes back is mapped onto it, and the same call after a kill goes on from
    there. `train` may then be any sequence of batches, with slices, that makes them when asked, such as
    helpers.jobs.StoryBatches, and, where torch.distributed is at work, is this rank's share. Raises ValueError for
    factors of another model, for "output_token" where the task's targets have no token axis, as fit_ekfac does for bad
    batches, and for a file `out` that is damaged or of another job.
    """
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}")
    whole = isinstance(rank, Integral) and rank >= 1
    if rank is not None and (not whole or per == "token_pair"):
        raise ValueError(f"rank must be None or a whole number of at least 1, got {rank!r}" if not whole else
                         f"rank must be None with per='token_pair', got {rank}: its pairs are of full rank")
    check_factors(model, factors)
    data = [None if out is None else hashlib.blake2b(digest_size=16) for _ in range(2)]
    check_targets(queries, task, "queries", data[0])
    examples, width = check_targets(train, task, "train", data[1])
    with frozen(model):
        scored = _scorer(model, factors, queries, train[0], task, damping, rank, per)
        if out is None:
            return scored(train, progress=progress)
        added = damping if damping is None or isinstance(damping, dict) else float(damping)
        values = {"queries": data[0].hexdigest(), "damping": added, "rank": rank, "per": per}
        values |= {name: digest_of(getattr(factors, name)) for name in ("Lambda", "Q_A", "Q_S")}
        return stream_scores(partial(scored, progress=False), train, examples, width, 1 + ("layer" in per), out,
                             job_of(model, task, data[1], values), progress)


def _scorer(model, factors, queries, batch, task, damping, rank, per):
    """scored(train, progress=...) -> Tensor, with P(∇L_q) of all queries at hand; batch: the first of train."""
    if per == "token_pair":
        return lambda train, progress: token_pair_scores(model, factors, queries, train, task, damping, progress)
    gradients = fastest_gradients(model, list(factors.A), task, batch)
    directions = _directions(gradients, factors, queries, damping, rank)
    if per == "output_token":
        return lambda train, progress: output_token_scores(model, train, directions, task, progress)
    score = _token_scores if per in ("token", ("layer", "token")) else sequence_scores
    return lambda train, progress: collect(gradients, train, directions, score, "layer" in per, progress)


def _directions(gradients, factors, queries, damping, rank):
    """{layer: P(∇L_q) [query, d_out, d_in (+1)], or its two thin factors}, one batch of queries after the other, so
    that with a rank no more than one batch's are ever whole."""
    parts = {name: [] for name in factors.A}
    for batch in queries:
        found = sum_over_tokens(gradients, [batch], list(parts))
        for name in parts:
            whole = factors.ihvp({name: found.pop(name)}, damping)[name]
            parts[name].append(whole if rank is None else truncate(whole, rank))
    if rank is None:
        return {name: torch.cat(parts.pop(name)) for name in list(parts)}
    return {name: tuple(map(torch.cat, zip(*part))) for name, part in parts.items()}


def check_factors(model, factors):
    """Raises ValueError where the factors were fitted on other layers or another model, TypeError for other things."""
    if not isinstance(factors, EKFACFactors):
        raise TypeError(f"factors must be EKFACFactors, which fit_ekfac makes and EKFACFactors.load reads, got "
                        f"{type(factors).__name__}")
    check_model(model)
    layers = list(factors.A)
    missing = sorted(set(layers) - {name for name, _ in model.named_modules()})
    if missing:
        raise ValueError(f"factors: {type(model).__name__} has no layer {missing[0]!r}: these are the factors of "
                         "another model")
    for name, shape in layer_shapes(model, layers).items():
        if tuple(factors.Lambda[name].shape) != shape:
            raise ValueError(f"factors: Lambda of {name!r} is {tuple(factors.Lambda[name].shape)}, that layer's "
                             f"gradient is {shape}: these are the factors of another model")
    if factors.fingerprint and factors.fingerprint != fingerprint(model):
        raise ValueError("factors: they were fitted at other weights than this model's; fit again, or say that you "
                         'mean it with dataclasses.replace(factors, fingerprint="")')


def sequence_gradients(model, batches, layers, task=causal_lm):
    """{layer: [example, d_out, d_in (+1)]}: gradients of each example's summed loss, in the order given."""
    with frozen(model):
        return sum_over_tokens(fastest_gradients(model, layers, task), batches, layers)


def sum_over_tokens(gradients, batches, layers):
    """What `sequence_gradients` returns, by way of the `fastest_gradients` of a model that is `frozen`."""
    groups, parts = by_length(batches), {name: [] for name in layers}
    for rows, batch in groups:
        got = gradients(batch)
        for name in layers:
            parts[name].append(finite(got.outputs[name].transpose(1, 2) @ got.inputs[name], name, rows))
    order = torch.cat([rows for rows, _ in groups]).argsort()
    return {name: torch.cat(value)[order] for name, value in parts.items()}


def truncate(V, rank):
    """(U [.., d_out, rank], W [.., rank, d_in]): U W is the best approximation of V of that rank (SVD in float64)."""
    U, sizes, W = torch.linalg.svd(V.double(), full_matrices=False)
    return (U[..., :rank] * sizes[..., None, :rank]).to(V), W[..., :rank, :].to(V)


def sequence_scores(a, ds, V):
    """[query, B]: ⟨V, Σ_t Ds_t ā_tᵀ⟩; the gradient of each example is formed once for all queries."""
    G = (ds.transpose(1, 2) @ a).flatten(1).T
    return torch.stack([(U @ W).flatten() @ G for U, W in zip(*V)]) if isinstance(V, tuple) else V.flatten(1) @ G


def _token_scores(a, ds, V):
    """[query, B, T]: Ds_tᵀ V ā_t; with V = U W, (Uᵀ Ds_t) · (W ā_t)."""
    if isinstance(V, tuple):
        return torch.stack([(ds @ U).mul_(a @ W.T).sum(2) for U, W in zip(*V)])
    if a.shape[2] <= ds.shape[2]:
        return torch.stack([(ds @ v).mul_(a).sum(2) for v in V])
    return torch.stack([(a @ v.T).mul_(ds).sum(2) for v in V])


def collect(gradients, train, directions, score, by_layer, progress):
    """Scores of every training batch, in the order given: [query, train (, seq)], with a first axis where by_layer.

    gradients: of the `fastest_gradients` for the layers of `directions`; score: `sequence_scores`, for instance.
    """
    groups, layers = by_length(train), list(directions)
    n, out = sum(len(rows) for rows, _ in groups), None
    for rows, batch in tqdm(groups, "influence", disable=not progress):
        got = gradients(batch)
        for number, name in enumerate(layers):
            value = finite(score(got.inputs[name], got.outputs[name], directions[name]), name, rows)
            value = value if value.dim() == 3 else value[..., None]
            if out is None:
                out = value.new_zeros(len(layers) if by_layer else 1, len(value), n, 1)
            if value.shape[2] > out.shape[3]:
                out = F.pad(out, (0, value.shape[2] - out.shape[3]))
            out[number if by_layer else 0][:, rows, : value.shape[2]] += value
    if score is sequence_scores:
        out = out[..., 0]
    elif "input_ids" in train[0]:
        out = F.pad(out, (0, max(batch["input_ids"].shape[-1] for batch in train) - out.shape[3]))
    return out if by_layer else out[0]


def self_influence(model, factors, train, task=causal_lm, damping=None, progress=True):
    """I(m, m) = Σ over layers of ⟨P(∇L_m), ∇L_m⟩, [train]; arguments and errors as in `influence`."""
    check_factors(model, factors)
    check_targets(train, task, "train")
    groups, layers = by_length(train), list(factors.A)
    scale = {name: factors.damped(name, damping).rsqrt() for name in layers}
    gradients = fastest_gradients(model, layers, task)
    with frozen(model):
        scores = torch.zeros(sum(len(rows) for rows, _ in groups), dtype=torch.float64)
        for rows, batch in tqdm(groups, "self-influence", disable=not progress):
            got = gradients(batch)
            for name in layers:
                a, ds = got.inputs[name], got.outputs[name]
                turned = rotated_gradients(a, ds, factors.Q_A[name].to(a), factors.Q_S[name].to(a))
                scores[rows] += finite((turned * scale[name].to(a.device)).square_().sum((1, 2)), name, rows).cpu()
    return scores.to(a)


def top_k(scores, k):
    """A DataFrame (query, rank, train, score): for every query its k most helpful, then its k most harmful, best first.

    scores: [query, train]. rank counts 1..k from the most helpful, and −1..−k from the most harmful. Raises ValueError
    where k is below 1 or 2k is above the number of training examples, and for scores that are not finite.
    """
    scores = torch.as_tensor(scores)
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1] // 2:
        raise ValueError(f"k={k} with scores of shape {tuple(scores.shape)}: scores must be [query, train], and k "
                         "from 1 to half of the training examples")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: some are NaN or infinite, which have no rank")
    order = scores.argsort(1, descending=True)
    order = torch.cat([order[:, :k], order.flip(1)[:, :k]], 1)
    ranks = [*range(1, k + 1), *range(-1, -k - 1, -1)]
    rows = [(query, rank, int(m), float(scores[query, m])) for query, found in enumerate(order)
            for rank, m in zip(ranks, found)]
    return pd.DataFrame(rows, columns=["query", "rank", "train", "score"])
