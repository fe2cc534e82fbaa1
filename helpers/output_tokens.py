"""Output-token attribution: how every training token's own loss moves along P(∇L_query), by forward-mode AD."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, jvp, vmap
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .examples import by_length
from .gradients import fast_paths, last_hidden
from .head import head_gradient
from .kernels import forward_mode
from .tasks import IGNORED, summed_loss

IN_FLIGHT = 1 << 19  # examples × queries × T² in one forward pass: attention's matrices then stay in the cache


def output_token_scores(model, train, directions, task, progress=True):
    """[query, train, seq]: d/dε of the loss on token t at θ + ε P(∇L_q) (Grosse et al. 2023, appendix B).

    directions: {layer: P(∇L_q) [query, d_out, d_in (+1)]}, all layers of one query together: its sum over tokens is
    the sequence score. Position t is that of the token whose loss it is: targets one shorter than `input_ids`, as
    those of `causal_lm`, begin at 1, others at 0; no target, no score. The model must be `frozen`. Raises ValueError
    for targets without a token axis or of another length, and for derivatives that are not finite; RuntimeError where
    forward-mode AD does not go through the model.
    """
    weights, tangents = _studied(model, directions)
    groups = [piece for group in by_length(train) for piece in _pieces(*group, tangents)]
    layers = list(directions)
    fast = "head" in fast_paths(model, groups[0][1], layers, task)
    parts, order = [], torch.cat([rows for rows, _ in groups]).argsort()
    with forward_mode(model), torch.no_grad():
        for rows, batch in tqdm(groups, "influence", disable=not progress):
            value = _batch_scores(_Call(model, _hidden if fast else task), weights, tangents, batch, fast)
            if not bool(value.isfinite().all()):
                raise ValueError("train: NaN or infinite derivatives in the batch of examples "
                                 f"{rows.tolist()} (numbered in the order given)")
            parts.append(value)
    width = max(max(batch["input_ids"].shape[1] if "input_ids" in batch else 0 for batch in train),
                max(value.shape[2] for value in parts))
    return torch.cat([F.pad(value, (0, width - value.shape[2])) for value in parts], 1)[:, order]


def _at_once(batch, tangents):
    """(examples, queries) that share one forward pass."""
    width = max(128, batch["input_ids"].shape[1] if "input_ids" in batch else 0)
    rows = max(1, IN_FLIGHT // width**2)
    queries = min(rows, len(next(iter(tangents.values()))))
    return rows // queries, queries


def _pieces(rows, batch, tangents):
    """[(rows [b], batch)]: the batch in pieces of as many examples as share a forward pass."""
    size = _at_once(batch, tangents)[0]
    return [(part, {key: value[i * size:i * size + len(part)] for key, value in batch.items()})
            for i, part in enumerate(rows.split(size))]


class _Call(torch.nn.Module):
    """`read(model, batch)` as a module, so that functional_call can replace the studied weights."""

    def __init__(self, model, read):
        super().__init__()
        self.model, self.read = model, read

    def forward(self, batch):
        return self.read(self.model, batch)


def _hidden(model, batch):
    """`causal_lm` without its head: the last hidden states [B, T-1, d] and the labels [B, T-1]."""
    return last_hidden(model, batch)[:, :-1], batch["labels"][:, 1:]


def _studied(model, directions):
    """({parameter of _Call: value}, {the same: its directions [query, ...]}); a bias is the last column of V."""
    weights, tangents, parameters = {}, {}, dict(model.named_parameters())
    for name, V in directions.items():
        module = model.get_submodule(name)
        if f"{name}.weight" not in parameters:
            raise ValueError(f"per='output_token': the weight of {name!r} is no parameter but made of one (pruned, "
                             "normalised): take per='token'")
        V = (V[0] @ V[1] if isinstance(V, tuple) else V).to(module.weight.dtype)
        if module.bias is not None:
            weights[f"model.{name}.bias"], tangents[f"model.{name}.bias"] = module.bias, V[..., -1]
            V = V[..., :-1]
        weights[f"model.{name}.weight"] = module.weight
        tangents[f"model.{name}.weight"] = V.mT if isinstance(module, Conv1D) else V
    return weights, tangents


def _batch_scores(call, weights, tangents, batch, fast):
    """[query, B, seq] of one batch; the loss's gradient at the outputs times the outputs' derivatives."""
    def push(tangent):
        return jvp(lambda some: functional_call(call, some, (batch,)), (weights,), (tangent,), has_aux=True)

    scores, size = [], _at_once(batch, tangents)[1]
    for start in range(0, len(next(iter(tangents.values()))), size):
        some = {name: value[start:start + size] for name, value in tangents.items()}
        try:
            outputs, moved, targets = vmap(push, out_dims=(None, 0, None))(some)
        except RuntimeError as error:
            raise RuntimeError(f"per='output_token': {type(call.model).__name__} cannot be differentiated forwards "
                               f"({str(error):.120}...): take per='token', or, where a hook calls requires_grad_, "
                               "model.disable_input_require_grads()") from error
        if not start:
            before = _first_position(batch, targets)
            upstream = _head_upstream(call.model, outputs, targets) if fast else _upstream(outputs, targets)
        single = torch.promote_types(moved.dtype, torch.float32)
        scores.append((moved.to(single) * upstream.to(single)).flatten(3).sum(3))
    return F.pad(torch.cat(scores), (before, 0))


def _first_position(batch, targets):
    """The position of targets[:, 0]: 1 where they are one shorter than the inputs, 0 where they are as long."""
    if targets.dim() < 2 + targets.is_floating_point():
        raise ValueError(f"per='output_token' needs targets with a token axis, this task's are {tuple(targets.shape)}: "
                         "take per='token', which splits the score over the input's tokens")
    before = batch["input_ids"].shape[1] - targets.shape[1] if "input_ids" in batch else 0
    if before not in (0, 1):
        raise ValueError(f"per='output_token': targets of {targets.shape[1]} positions for inputs of "
                         f"{batch['input_ids'].shape[1]}: they must be as long, or one shorter (the next tokens)")
    return before


def _upstream(outputs, targets):
    """∂L/∂outputs, [B, T, .., C]; the row of a target holds the gradient of its loss alone."""
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        return torch.autograd.grad(summed_loss(outputs, targets), outputs)[0]


def _head_upstream(model, hidden, targets):
    """∂L/∂h, [B, T-1, d]: the same through the output head in closed form."""
    rows, out = targets != IGNORED, torch.zeros_like(hidden)
    out[rows] = head_gradient(hidden[rows], model.get_output_embeddings(), targets[rows])
    return out
