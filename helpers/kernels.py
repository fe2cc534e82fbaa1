"""What lies between a model's linear layers in other forms: faster ones, and plain ones for forward-mode AD."""

import time
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.activations import NewGELUActivation
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

ROWS = 32  # queries in a block
WEIGHTS = 2**19  # attention weights at a time: what stays in the cache
NARROW = 16  # from this width of a head on, PyTorch's own kernel is as fast


@contextmanager
def eager_attention(model):
    """Inside, attention is made of plain operations, which forward-mode AD can differentiate; afterwards as it was.

    transformers' models are switched to "eager"; a module that calls PyTorch's attention itself gets its plain kernel.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()
              if getattr(config, "_attn_implementation", None)]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, name in before:  # outer configurations first: setting one sets those inside it
            config._attn_implementation = name


@contextmanager
def forward_mode(model):
    """Inside, PyTorch's attention and the experts of transformers' mixtures are made of plain operations, which
    forward-mode AD can differentiate; afterwards as they were."""
    configs = [module.config for module in model.modules() if getattr(
        getattr(module, "config", None), "_experts_implementation_internal", None)]
    before = [config._experts_implementation_internal for config in configs]
    try:
        for config in configs:
            config._experts_implementation_internal = "eager"
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no forward mode
            yield
    finally:
        for config, name in reversed(list(zip(configs, before))):
            config._experts_implementation_internal = name


@contextmanager
def fast_kernels(model):
    """Inside, PyTorch's attention on a CPU is `attend` where heads are narrow and that pays, and code that spells out
    what PyTorch has a kernel for calls that: GPT-Neo's attention, and GPT-2's GELU with a tanh.

    First derivatives only. With heads of width 8 and 256 tokens PyTorch's kernel took twice as long as `attend` on one
    machine and three to four fifths as long on two others, hence `blocks_pay`; GPT-Neo's own code took seven times as
    long; the GELU spelled out, twice the kernel.
    """
    patched = {}
    for module in model.modules():
        if type(module) is GPTNeoSelfAttention and "_attn" not in vars(module):  # else it is the user's own
            patched[module] = ("_attn", _NeoAttention(module))
        elif type(module) is NewGELUActivation and "forward" not in vars(module):
            patched[module] = ("forward", partial(F.gelu, approximate="tanh"))
    try:
        for module, (name, function) in patched.items():
            setattr(module, name, function)
        with _NarrowHeads():
            yield
    finally:
        for module, (name, _) in patched.items():
            vars(module).pop(name, None)


class _NeoAttention:
    """GPT-Neo's attention (no scaling, a window in local layers) by way of PyTorch's."""

    def __init__(self, module):
        self.window = module.bias

    def __call__(self, query, key, value, attention_mask=None):
        mask, window = attention_mask, self.window[:, :, key.shape[2] - query.shape[2]:key.shape[2], :key.shape[2]]
        if mask is None or not window[0, 0, -1, 0]:  # the window is narrower than the text
            mask = window if mask is None else window & (mask == 0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0), None


class _NarrowHeads(TorchFunctionMode):
    """Sends PyTorch's attention to `attend` where heads are narrow and one mask serves all heads of an example."""

    def __init__(self):
        super().__init__()
        self.mask = self.plan = None  # the last mask and its plan: most models give all their layers the same one

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                  enable_gqa=False):
        narrow = query.dim() == 4 and query.shape[3] == value.shape[3] < NARROW and query.device.type == "cpu"
        if attn_mask is None:
            known = is_causal
        else:
            known = attn_mask.dim() == 2 or (attn_mask.dim() == 4 and attn_mask.shape[1] == 1)
            known = known and not attn_mask.requires_grad
        known = narrow and known and not dropout_p and query.dtype.itemsize >= 4
        if not known or not blocks_pay(query.shape[3], torch.get_num_threads()):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                                  enable_gqa=enable_gqa)
        if attn_mask is None:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not self.mask:
            whole = attn_mask.expand(*attn_mask.shape[:-2], query.shape[2], key.shape[2])
            self.mask, self.plan = attn_mask, plan(whole, query)
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        key, value = (x.expand(*query.shape[:2], -1, -1) for x in (key, value))
        return attend(query, key, value, self.plan, query.shape[3] ** -0.5 if scale is None else scale)


@cache
def blocks_pay(width, threads):
    """Whether `attend` takes less than three quarters of the time of PyTorch's kernel on this machine, with so many
    threads: forward and backward on eight examples with eight heads of this width and 256 tokens (fewer examples would
    keep two threads too short of work to tell); the best of six. Decided once in a process."""
    query = torch.arange(8 * 8 * 256 * width, device="cpu").sin().view(8, 8, 256, width).requires_grad_()
    mask = torch.ones(256, 256, dtype=torch.bool, device="cpu").tril()
    runs = (lambda: attend(query, query, query, plan(mask, query), 1.0),
            lambda: F.scaled_dot_product_attention(query, query, query, mask, scale=1.0))
    blocks, kernel = (min(times) for times in zip(*([_seconds(run, query) for run in runs] for _ in range(6))))
    return blocks < 0.75 * kernel


def _seconds(run, query):
    start = time.perf_counter()
    with torch.enable_grad():
        torch.autograd.grad(run().sum(), query)
    return time.perf_counter() - start


def plan(mask, query):
    """(bias, spans, blind) of a mask [T, S] or [B or 1, 1, T, S]: True, or 0 to be added, at keys seen.

    bias [B or 1, 1, T, S] is added; a span is (rows, first key seen by any of them, first key not seen by all, last key
    seen by any + 1); blind [B or 1, 1, T, 1] marks queries that see no key, or is None.
    """
    low, mask = torch.finfo(query.dtype).min, mask[None, None] if mask.dim() == 2 else mask
    seen = mask if mask.dtype is torch.bool else mask > low / 2
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, low) if seen is mask else (
        mask.to(query.dtype).clamp(min=low))
    plain = (seen if seen is mask else mask == 0).flatten(0, 1).all(0)
    blind, seen, spans = ~seen.any(3, keepdim=True), seen.flatten(0, 1).any(0), []
    for top in range(0, len(seen), ROWS):
        rows = slice(top, min(top + ROWS, len(seen)))
        keys = seen[rows].any(0).nonzero().flatten().tolist() or [0]
        masked = (~plain[rows].all(0)).nonzero().flatten().tolist()
        spans.append((rows, keys[0], next((key for key in masked if key >= keys[0]), keys[-1] + 1), keys[-1] + 1))
    return bias, spans, blind if bool(blind.any()) else None


def attend(query, key, value, plan, scale):
    """softmax(scale · query keyᵀ + mask) value, [B, H, T, d], in blocks whose weights stay in the cache.

    query [B, H, T, d], key and value [B, H, S, d]; `plan(mask, query)`. Keys that no query of a block sees are left
    out; a query that sees none gets 0. The weights are made again on the way back, as in FlashAttention (Dao et al.
    2022); products with a narrow side are written with that side first: BLAS is several times slower otherwise.
    """
    bias, spans, blind = plan
    flat = [x.reshape(-1, *x.shape[2:]) for x in (query * scale, key, value)]
    out = _Blocks.apply(*flat, bias, spans, query.shape[1]).unflatten(0, query.shape[:2])
    return out if blind is None else out.masked_fill(blind, 0)


class _Blocks(torch.autograd.Function):
    """`attend` on [B·H, T, d]; the letters of its backward pass are those of Dao et al. 2022, appendix B."""

    @staticmethod
    def forward(ctx, q, k, v, bias, spans, heads):
        kt, vt = (x.transpose(1, 2).contiguous() for x in (k, v))
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=q.dtype)
        step = heads * max(1, WEIGHTS // (heads * ROWS * k.shape[1]))
        ctx.blocks = [(slice(at, min(at + step, len(q))), *span) for at in range(0, len(q), step) for span in spans]
        ctx.heads = heads
        for g, rows, first, masked, last in ctx.blocks:
            p = _weights(q, kt, bias, heads, g, rows, first, masked, last)
            out[g, :, rows] = vt[g, :, first:last] @ p.transpose(1, 2)
        ctx.save_for_backward(q, kt, vt, bias, out)
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, kt, vt, bias, out = ctx.saved_tensors
        do, dot, qt = do.contiguous(), do.transpose(1, 2).contiguous(), q.transpose(1, 2).contiguous()
        minus_d = -(dot * out).sum(1)[..., None]
        dq, dk, dv = torch.empty_like(qt), torch.zeros_like(kt), torch.zeros_like(vt)
        for g, rows, first, masked, last in ctx.blocks:
            keys = slice(first, last)
            p = _weights(q, kt, bias, ctx.heads, g, rows, first, masked, last)
            dv[g, :, keys] += dot[g, :, rows] @ p
            ds = torch.baddbmm(minus_d[g, rows], do[g, rows], vt[g, :, keys]).mul_(p)
            dq[g, :, rows] = kt[g, :, keys] @ ds.transpose(1, 2)
            dk[g, :, keys] += qt[g, :, rows] @ ds
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None


def _weights(q, kt, bias, heads, g, rows, first, masked, last):
    """The attention weights of one block, [pairs, rows, keys]."""
    p = q[g, rows] @ kt[g, :, first:last]
    if masked < last:
        examples = slice(g.start // heads, g.stop // heads) if len(bias) > 1 else slice(None)
        p.unflatten(0, (-1, heads))[..., masked - first:] += bias[examples, :, rows, masked:last]
    return torch.softmax(p, -1, out=p)
