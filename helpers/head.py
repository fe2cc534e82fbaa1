"""Gradient of a language model's loss at its last hidden state, without autograd through the vocabulary."""

import torch

from .tasks import check_classes

CHUNK = 4_000_000  # logits held at a time


def head_gradient(hidden, head, targets, uniforms=None):
    """∂L/∂h for L = Σ −log softmax(W h + b)[y]: Wᵀ(p − onehot(y)), one row a target, in chunks of logits.

    hidden [n, d]; head an `nn.Linear` with weight [V, d]; targets [n] (no -100). With `uniforms` [n] in (0, 1), y is
    drawn from p by inverting its distribution function and `targets` is not read. Returns [n, d], summed-loss units.
    Raises IndexError for a target that is no row of W.
    """
    check_classes(targets, len(head.weight))
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    out = torch.empty_like(hidden)
    rows = max(1, CHUNK // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = torch.mm(hidden[part], weight.T) if bias is None else torch.addmm(bias, hidden[part], weight.T)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # sums over a vocabulary need it
        p = logits.sub_(logits.amax(1, keepdim=True)).exp_()
        total, y = _total_and_draw(p, None if uniforms is None else uniforms[part])
        if p.dtype != weight.dtype:
            p, total = p.div_(total[:, None]).to(weight.dtype), torch.ones_like(total, dtype=weight.dtype)
        torch.mm(p, weight, out=out[part])
        out[part] /= total[:, None]
        out[part] -= weight[targets[part] if y is None else y]
    return out


def _total_and_draw(p, uniforms, block=128):
    """Row sums [n] of unnormalised probabilities p [n, V] and, with uniforms, the inverse distribution function there.

    Block sums first, then inside one block: a running sum over the whole vocabulary costs more than the softmax.
    """
    whole = p.shape[1] // block * block
    sums = p[:, :whole].unflatten(1, (-1, block)).sum(2) if whole else p.new_zeros(len(p), 0)
    sums = torch.cat([sums, p[:, whole:].sum(1, keepdim=True)], 1)
    upto = sums.double().cumsum(1)
    if uniforms is None:
        return upto[:, -1].to(p.dtype), None
    goal = uniforms * upto[:, -1]
    at = torch.searchsorted(upto, goal[:, None]).clamp_(max=sums.shape[1] - 1)
    below = goal - (upto.gather(1, at) - sums.gather(1, at))[:, 0]
    index = at * block + torch.arange(block, device=p.device)
    inside = p.gather(1, index.clamp(max=p.shape[1] - 1)).double().masked_fill_(index >= p.shape[1], 0).cumsum(1)
    step = torch.searchsorted(inside, below[:, None])[:, 0].clamp_(max=block - 1)
    return upto[:, -1].to(p.dtype), (at[:, 0] * block + step).clamp_(max=p.shape[1] - 1)
