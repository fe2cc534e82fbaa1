"""Influence by pairs of tokens: every position of the query against every position of the training example."""

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .examples import by_length
from .gradients import fastest_gradients, finite

CHUNK = 1 << 23  # numbers held in one block of per-token gradients


def token_pair_scores(model, factors, queries, train, task, damping=None, progress=True):
    """[query, train, q_seq, seq]: Σ over layers of ⟨P(Ds_u ā_uᵀ), Ds_t ā_tᵀ⟩, u a position of q and t one of m.

    In the eigenbasis, with x = Q_Sᵀ Ds and y = Q_Aᵀ ā, that is Σ_ij x_ui y_uj x_ti y_tj / (Lambda_ij + damping): one
    product of two matrices [u, ij] and [t, ij]. Ds_u is that of the query's whole loss, so its prompt counts too. 0 on
    pads. The sum over u is the score by token, the sum over both the sequence score. The model must be `frozen`.
    """
    weights = {name: factors.damped(name, damping).reciprocal() for name in factors.A}
    asked = {name: [] for name in weights}
    for tokens in _rotated_tokens(model, factors, queries, task, progress=False):
        for name in weights:
            asked[name].append(tokens[name])
    asked = {name: [torch.cat(column) for column in zip(*parts)] for name, parts in asked.items()}
    shape = _shape(queries, asked)
    out = torch.zeros(shape[0], sum(_sizes(train)), shape[1], 1)
    for tokens in _rotated_tokens(model, factors, train, task, progress):
        width = _shape(train, tokens)[1]
        if width > out.shape[3]:
            out = F.pad(out, (0, width - out.shape[3]))
        for name, (row, at, x, y) in tokens.items():
            q_row, q_at, q_x, q_y = asked[name]
            out = out.to(x)
            out[q_row[:, None], row, q_at[:, None], at] += _products(q_x, q_y, x, y, weights[name].to(x))
    return out


def _sizes(batches):
    return [len(next(iter(batch.values()))) for batch in batches]


def _shape(batches, tokens):
    """(examples, positions): the widest `input_ids`, or where there are none, what the layers saw."""
    widest = max(batch["input_ids"].shape[-1] if "input_ids" in batch else 1 for batch in batches)
    return sum(_sizes(batches)), max(widest, *(1 + int(at.max()) for _, at, _, _ in tokens.values()))


def _rotated_tokens(model, factors, batches, task, progress):
    """For every batch {layer: (example [n], position [n], x [n, d_out], y [n, d_in (+1)])} of its real positions.

    The rotation is float64: small coordinates, which the division enlarges, keep their digits.
    """
    layers = list(factors.A)
    gradients = fastest_gradients(model, layers, task)
    for rows, batch in tqdm(by_length(batches), "influence", disable=not progress):
        got, out = gradients(batch), {}
        for name in layers:
            a, ds, real = got.inputs[name], got.outputs[name], got.real[name]
            index, at = (torch.ones(a.shape[:2], device=a.device) if real is None else real).nonzero(as_tuple=True)
            x, y = (finite(side[index, at].double() @ Q.to(a.device), name, rows).to(a)
                    for side, Q in ((ds, factors.Q_S[name]), (a, factors.Q_A[name])))
            out[name] = rows.to(index)[index], at, x, y
        yield out


def _products(q_x, q_y, x, y, weight):
    """[u, t]: Σ_ij q_x[u, i] q_y[u, j] weight[i, j] x[t, i] y[t, j], in blocks of CHUNK numbers on either side."""
    step = max(1, CHUNK // weight.numel())
    out = x.new_empty(len(q_x), len(x))
    for t in range(0, len(x), step):
        right = (x[t:t + step, :, None] * y[t:t + step, None]).flatten(1)
        for u in range(0, len(q_x), step):
            left = (q_x[u:u + step, :, None] * q_y[u:u + step, None]).mul_(weight).flatten(1)
            torch.mm(left, right.T, out=out[u:u + step, t:t + step])
    return out
