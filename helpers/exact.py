"""Influence with nothing approximated: the whole curvature matrix, its product with vectors, and leave-one-out.

The P parameters that require gradients, flattened and in the order of `model.named_parameters()`, are the axes of every
vector and matrix; the others are constants. The loss of an example is summed over its targets, the curvature is a mean
over examples. Memory and time grow with P² and P³: comfortable up to a few thousand parameters.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from math import prod

import torch
from torch.func import functional_call, grad, vjp, vmap

from .examples import check_targets
from .kernels import eager_attention
from .layers import frozen
from .tasks import IGNORED, asked, summed_loss

NUMBERS = 1 << 22  # in one block of per-example derivatives
VECTORS = 32  # that go back through the model at once


def hessian(model, batch, task, damping=0.0):
    """∇²_θ of the mean over examples of L, + damping I: [P, P], float64, computed in the model's own precision.

    batch: a dict with a leading example axis, or a list of such (one at a time, less memory). A weight decay
    ½ wd ‖θ‖² in the objective is damping=wd. Raises ValueError for a model without parameters that require gradients,
    and for a task that does not give (outputs, targets) of matching shapes.
    """
    with _studied(model, task, batch, "batch") as (loss, theta, batches):
        basis = torch.eye(_size(theta)).to(_first(theta))
        H = torch.cat([_products(loss, theta, batches, rows) for rows in basis.split(VECTORS)]).double()
        return _damped((H + H.T) / 2, damping)


def ggn(model, batch, task, damping=0.0):
    """Generalised Gauss-Newton matrix (1/N) Σ_n J_nᵀ H_n J_n + damping I, [P, P] float64 (Schraudolph 2002).

    J_n = ∂outputs_n/∂θ; H_n is the Hessian of the loss in the outputs, block by target: diag(p) − p pᵀ for integer
    targets, the identity for floating ones. It is the true Fisher matrix. Arguments and errors as in `hessian`.
    """
    with _studied(model, task, batch, "batch") as (loss, theta, batches):
        P = _size(theta)
        G = torch.zeros(P, P, dtype=torch.float64, device=_first(theta).device)
        for one in batches:
            n_rows = prod(loss.outputs(theta, one)[0].shape[1:])
            rows = max(1, min(n_rows, NUMBERS // P))
            roots = vmap(lambda example, index: _curvature_roots(loss, theta, example, index), (0, None))
            for examples in _split(one, max(1, NUMBERS // (P * rows))):
                for index in torch.arange(n_rows, device=G.device).split(rows):
                    R = roots(examples, index).flatten(0, 1).double()
                    G.addmm_(R.T, R)
        return _damped(G / _count(batches), damping)


def hvp(model, batch, v, task):
    """H v with the Hessian of `hessian`, undamped, at the price of a few gradients and without the matrix.

    v: [P], or [k, P] for k products at once; or a dict of tensors shaped like the parameters that require gradients.
    The same comes back, in the parameters' dtype (Pearlmutter 1994). Raises ValueError for other shapes or names.
    """
    with _studied(model, task, batch, "batch") as (loss, theta, batches):
        flat, P = _named(v, theta) if isinstance(v, Mapping) else v, _size(theta)
        if not isinstance(flat, torch.Tensor) or flat.dim() not in (1, 2) or flat.shape[-1] != P:
            raise ValueError(f"v: got {getattr(flat, 'shape', type(flat).__name__)}; the parameters that require "
                             f"gradients are {P} numbers: give [{P}], [k, {P}] or a dict like them")
        flat = flat.to(_first(theta))
        out = torch.cat([_products(loss, theta, batches, rows) for rows in flat.reshape(-1, P).split(VECTORS)])
        if isinstance(v, Mapping):
            return {name.removeprefix("model."): value for name, value in _unflat(out[0], theta).items()}
        return out.reshape(flat.shape)


def exact_influence(model, queries, train, task, damping=0.0, curvature="hessian"):
    """I(q, m) = ∇L_qᵀ (C + damping I)⁻¹ ∇L_m, [query, train] float64 (Koh & Liang 2017, equation 2, with this sign).

    C: the `hessian` or the `ggn` of `train`, by a Cholesky solve. Positive = proponent: up-weighting m by ε changes L_q
    by −ε I, removing it is ε = −1/N. queries, train: a dict or a list of dicts. Raises ValueError where C + damping I
    is singular or indefinite, with its smallest eigenvalue and a damping that would do, and as `hessian` does.
    """
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"curvature must be 'hessian' or 'ggn', got {curvature!r}")
    with _studied(model, task, queries, "queries") as (loss, theta, batches):
        asked = _gradients(loss, theta, batches)
    with _studied(model, task, train, "train") as (loss, theta, batches):
        given = _gradients(loss, theta, batches)
    C = (hessian if curvature == "hessian" else ggn)(model, train, task, damping)
    _check_definite(C, curvature, damping, torch.finfo(_first(theta).dtype).eps)
    return asked @ torch.cholesky_solve(given.T, torch.linalg.cholesky(C))


def leave_one_out(refit, losses, n):
    """What influence predicts, by retraining: [query, removed] float64, the loss without i minus the loss with all.

    refit(i) trains without example i, refit(None) with all n, and returns anything that losses(·) turns into the loss
    of every query, [query]. Positive = the example helped: to first order I(q, i) / N. Keep the factor 1/N of the
    objective in refit (removal is ε = −1/N, no mean over N − 1). Raises ValueError where losses are not [query].
    """
    measured = [_query_losses(losses(refit(i)), i) for i in [None, *range(n)]]
    return torch.stack(measured[1:], 1) - measured[0][:, None]


def _query_losses(values, i):
    values = torch.as_tensor(values).detach().double()
    if values.dim() != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"losses: refit({i}) gave losses of shape {tuple(values.shape)}, {values.flatten()[:3]}…; "
                         "they must be finite numbers, one a query: [query]")
    return values


class _Loss(torch.nn.Module):
    """Outputs, targets and summed loss as functions of the parameters: a task sees the model itself, not a copy."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch):
        return asked(self.task, self.model, batch)

    def outputs(self, theta, batch):
        return functional_call(self, theta, (batch,))

    def summed(self, theta, batch):
        return summed_loss(*self.outputs(theta, batch))


@contextmanager
def _studied(model, task, batch, argument):
    """(loss, {name: parameter that requires gradients}, list of batches), with the model frozen and put back after."""
    batches = [dict(one) for one in ([batch] if isinstance(batch, Mapping) else batch)]
    check_targets(batches, task, argument)
    loss = _Loss(model, task)
    theta = {name: p.detach() for name, p in loss.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError(f"model: no parameter of {type(model).__name__} requires gradients; "
                         "set requires_grad_(True) on those to be studied")
    kinds = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()}
    some = {key: value[:2] for key, value in batches[0].items()}
    with frozen(model):
        own = None if kinds <= {None, "eager"} else _outputs(loss, some)
        with eager_attention(model):  # some models round it to float32; NaN is no rounding
            if own is not None and not float((own - _outputs(loss, some)).norm()) <= 1e-4 * float(own.norm()):
                raise ValueError(f"model: {type(model).__name__}'s attention written out, as second derivatives need, "
                                 "gives other outputs than its own, or NaN: study it without pads, or another model")
            yield loss, theta, batches


def _outputs(loss, batch):
    with torch.no_grad():
        return loss(batch)[0]


def _products(loss, theta, batches, rows):
    """[k, P]: the mean Hessian times each of the rows, by reverse over reverse: one graph for all of them."""
    total = 0
    for batch in batches:
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        with torch.enable_grad():
            first = torch.autograd.grad(loss.summed(leaves, batch), list(leaves.values()), create_graph=True,
                                        materialize_grads=True)
            gradient = torch.cat([g.flatten() for g in first])
        one = len(rows) == 1  # without vmap, whose overhead would be most of the time
        second = torch.autograd.grad(gradient, list(leaves.values()), rows[0] if one else rows,
                                     is_grads_batched=not one, materialize_grads=True)
        total = total + torch.cat([g.reshape(len(rows), -1) for g in second], 1)
    return total / _count(batches)


def _gradients(loss, theta, batches):
    """[examples, P] float64: the gradient of every example's loss."""
    one = vmap(lambda example: _flat(grad(loss.summed)(theta, _alone(example)), theta))
    parts = [part for batch in batches for part in _split(batch, max(1, NUMBERS // _size(theta)))]
    return torch.cat([one(part) for part in parts]).double()


def _curvature_roots(loss, theta, example, index):
    """[rows, P]: the rows numbered `index` (target, class) of R with Rᵀ R = Jᵀ H J, for one example.

    diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ, so row c of a target is Jᵀ √p_c (e_c − p).
    """
    outputs, back, targets = vjp(lambda theta: loss.outputs(theta, _alone(example)), theta, has_aux=True)
    shape, C = outputs.shape, outputs.shape[-1]
    chosen = torch.nn.functional.one_hot(index % C, C).to(outputs)
    if not targets.is_floating_point():
        p = outputs.reshape(-1, C)[index // C].softmax(-1)
        taken = targets.flatten()[index // C].ne(IGNORED).to(p)
        chosen = (chosen - p) * ((p * chosen).sum(-1).sqrt() * taken)[:, None]
    place = torch.nn.functional.one_hot(index // C, shape.numel() // C).to(outputs)
    cotangents = (place[:, :, None] * chosen[:, None]).reshape(-1, *shape)
    return vmap(lambda cotangent: _flat(back(cotangent)[0], theta))(cotangents)


def _check_definite(C, curvature, damping, eps):
    values = torch.linalg.eigvalsh(C)
    low, size = float(values[0]), float(values.abs().max())
    rounding = 10 * len(C) ** 0.5 * eps * size  # what is left of an eigenvalue that should be zero
    if not low > rounding:
        kind = "singular" if low > -rounding else "indefinite"
        raise ValueError(f"damping={damping:g}: the {curvature} + damping is {kind}, its smallest eigenvalue {low:.3g} "
                         f"and its largest {float(values[-1]):.3g}; give a damping of about "
                         f"{damping + 1.1 * max(0.0, -low) + 0.01 * size:.2g}, or more")


def _damped(matrix, damping):
    if not damping >= 0:
        raise ValueError(f"damping must be a number of at least 0, got {damping}")
    matrix.diagonal().add_(damping)
    return matrix


def _flat(values, theta):
    return torch.cat([values[name].flatten() for name in theta])


def _unflat(vector, theta):
    parts = vector.split([p.numel() for p in theta.values()])
    return {name: part.view_as(p) for (name, p), part in zip(theta.items(), parts)}


def _named(v, theta):
    """The dict `v` of the caller as one vector; ValueError where its names or shapes are not the parameters'."""
    wanted, got = ({key: tuple(x.shape) for key, x in values.items()} for values in (theta, v))
    if {f"model.{name}": shape for name, shape in got.items()} != wanted:
        raise ValueError(f"v: got {got}; the parameters that require gradients are "
                         f"{ {name.removeprefix('model.'): shape for name, shape in wanted.items()} }")
    return _flat({f"model.{name}": x for name, x in v.items()}, theta)


def _first(theta):
    return next(iter(theta.values()))  # for its dtype and device


def _size(theta):
    return sum(p.numel() for p in theta.values())


def _alone(example):
    return {key: value[None] for key, value in example.items()}


def _split(batch, step):
    return [{key: value[at:at + step] for key, value in batch.items()} for at in range(0, _count([batch]), step)]


def _count(batches):
    return sum(len(next(iter(batch.values()))) for batch in batches)
