"""The tests of truth 1-6 as properties of random small models and batches, and mutants that each must break one.

Every reference is written here: loops, dense matrices, autograd on one unpadded sequence at a time.
PROPERTY_EXAMPLES in the environment: so many cases of each property, and other ones every time.
"""

import copy
import os
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from helpers import EKFACFactors, causal_lm, ekfac, fit_ekfac, gradients, influence, linear_layers, output_tokens
from helpers.tasks import summed_loss

QUIET = {"progress": False}
SOAK = os.environ.get("PROPERTY_EXAMPLES")
EXAMPLES = int(SOAK or 60)  # of each property
IGNORED = -100


# Random cases ---


@dataclass(frozen=True)
class Case:
    """A model, the layers studied, and sequences; texts: (length, first labelled token, bits that mask more)."""

    kind: str
    dtype: torch.dtype
    bias: bool
    heads: int
    width: int  # of a head; 4 at least: a layer norm of two numbers is their sign, which no gradient describes
    depth: int
    inner: int
    vocabulary: int
    pattern: str
    seed: int
    texts: list
    size: int
    pads: int

    @property
    def exact(self):
        """GPT-Neo casts queries and keys to float32 inside its attention, also in a float64 model."""
        return self.dtype is torch.float64 and self.kind != "gpt_neo"


TEXTS = st.lists(st.tuples(st.integers(2, 9), st.integers(0, 8), st.integers(0, 511)), min_size=2, max_size=6)
CASES = st.builds(
    Case, kind=st.sampled_from(["gpt2", "gpt_neo", "llama"]), dtype=st.sampled_from([torch.float64, torch.float32]),
    bias=st.booleans(), heads=st.sampled_from([1, 2]), width=st.sampled_from([4, 6]), depth=st.integers(1, 2),
    inner=st.integers(3, 17), vocabulary=st.integers(6, 40),
    pattern=st.sampled_from(["mlp", "attn", "mlp|attn", r"0\.(mlp|attn|self_attn)", "(down|c|o|out)_proj"]),
    seed=st.integers(0, 10_000), texts=TEXTS, size=st.integers(1, 6), pads=st.integers(0, 3))  # fmt: skip


def model_of(case):
    """The model of a case, all of whose parameters are moved from their initial constants."""
    torch.manual_seed(case.seed)
    hidden, shape = case.heads * case.width, {"vocab_size": case.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if case.kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=hidden, n_layer=case.depth, n_head=case.heads, n_inner=case.inner,
                                           n_positions=16, **shape))  # fmt: skip
    elif case.kind == "gpt_neo":
        model = GPTNeoForCausalLM(GPTNeoConfig(
            hidden_size=hidden, num_layers=case.depth, num_heads=case.heads, intermediate_size=case.inner,
            max_position_embeddings=16, attention_types=[[["local"], case.depth]], window_size=3, **shape))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=hidden, num_hidden_layers=case.depth, num_attention_heads=case.heads, num_key_value_heads=1,
            intermediate_size=case.inner, max_position_embeddings=16, attention_bias=case.bias, mlp_bias=case.bias,
            **shape))  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear) and not case.bias and case.kind == "gpt_neo":
            module.bias = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(case.dtype).eval()


def examples_of(case, seed=0):
    """[(input_ids, labels)], each with a target at least."""
    generator = torch.Generator().manual_seed(case.seed + seed)
    out = []
    for length, prompt, bits in [(4, 0, 0), *case.texts]:  # the first one's gradient is not zero in any layer
        ids = torch.randint(case.vocabulary, (length,), generator=generator)
        hidden = torch.tensor([t < prompt or bool(bits >> t & 1) for t in range(length)])
        hidden[-1] &= bool((~hidden[1:-1]).any())
        out.append((ids, ids.masked_fill(hidden, IGNORED)))
    return out


def near(case, x, y, rtol=1e-9, loose=2e-3, size=0.0):
    """‖x − y‖ ≤ rtol ‖y‖; `loose` instead where the model computes in float32, in whole or in part, and then also
    within float32's rounding of what is of norm `size`: a layer's gradient may be nothing beside another's."""
    x, y = x.double(), y.double()
    limit = rtol * float(y.norm()) if case.exact else loose * float(y.norm()) + 1e-4 * float(size)
    return float((x - y).norm()) <= limit + 1e-12


def damping_of(case, factors):
    """None, or a damping that keeps layers whose gradients are nothing but rounding out of the scores."""
    means = [float(Lambda.mean()) for Lambda in factors.Lambda.values()]
    return None if case.exact and min(means) > ekfac.NOISE * max(means) else 0.1 * max(means)


def by_autograd(model, layers, examples):
    """{layer: [example, d_out, d_in (+1)]} in float64, from the loss written out."""
    losses = [tiny.loss_of(model, *example) for example in examples]
    return {name: torch.stack([tiny.weight_gradient(model, name, loss) for loss in losses]).double()
            for name in layers}  # fmt: skip


def dense(factors, layer, damping):
    """(Q_A ⊗ Q_S) diag(vec(Λ + damping)) (Q_A ⊗ Q_S)ᵀ for column-stacking vec."""
    Q = torch.kron(factors.Q_A[layer], factors.Q_S[layer])
    return Q @ torch.diag((factors.Lambda[layer] + damping).T.flatten()) @ Q.T


def solved(factors, layer, V, damping=None):
    """P(V) of one [d_out, d_in] by a dense solve."""
    damping = 0.1 * float(factors.Lambda[layer].mean()) if damping is None else damping
    flat = torch.linalg.solve(dense(factors, layer, damping), V.double().T.flatten())
    return flat.reshape(V.shape[1], V.shape[0]).T


def equal_factors(case, factors, others, loose=2e-3):
    return factors.n_tokens == others.n_tokens and all(
        near(case, getattr(factors, m)[name], getattr(others, m)[name], loose=loose,
             size=max(float(x.norm()) for x in getattr(factors, m).values()))
        for m in ("A", "S") for name in factors.A)  # fmt: skip


def rotation_free(factors, layer):
    """The curvature matrix itself, which does not depend on the signs of eigenvectors or on ties among them."""
    return dense(factors, layer, 0.0)


# The properties ---


def gradients_and_sums(case, task=causal_lm):
    """1. Σ_t of per-token gradients = autograd; sums over tokens and layers = the score = its definition."""
    model, examples, queries = model_of(case), examples_of(case), examples_of(case, 1)
    layers = linear_layers(model, case.pattern)
    train, asked = tiny.batches(examples, case.size, case.pads), tiny.batches(queries, case.size)
    factors = fit_ekfac(model, train, layers, task=task, **QUIET)
    damping = damping_of(case, factors)
    get = lambda per: influence(model, factors, asked, train, task=task, per=per, damping=damping, **QUIET)
    kinds = ("sequence", "token", "layer", ("layer", "token"), "output_token")
    whole, token, layer, both, output = map(get, kinds)
    G, Q = by_autograd(model, layers, examples), by_autograd(model, layers, queries)
    largest = max(float(g.norm()) for g in G.values())
    with gradients_frozen(model):
        at = 0
        for batch in train:
            got = gradients.token_gradients(model, batch, layers, task)
            for name in layers:
                ours = torch.einsum("bto,bti->boi", got.outputs[name], got.inputs[name])
                assert near(case, ours, G[name][at:at + len(ours)], size=largest), "per-token gradients"
            at += len(batch["input_ids"])
    size = both.abs().sum((0, -1)).max()
    rounding = 1e-10 if case.dtype is torch.float64 else 1e-5
    for total in (token.sum(-1), layer.sum(0), both.sum((0, -1))):
        assert float((total - whole).abs().max()) <= rounding * float(size), "sums"
    rounding = rounding if case.kind == "gpt2" else 1e-5  # the others' float32 parts round otherwise in forward mode
    if case.dtype is torch.float32:  # a layer norm of nearly equal numbers magnifies what is rounded, either way's
        twin, free = copy.deepcopy(model).double(), replace(factors, fingerprint="")
        truth = influence(twin, free, asked, train, task=task, damping=damping, **QUIET)
        rounding = max(rounding, 2 * float((whole - truth).abs().max() / size))
    assert float((output.sum(-1) - whole).abs().max()) <= rounding * float(size), "sums over output tokens"
    for mask, column in zip(_real(examples, token.shape[-1]), token.unbind(1)):
        assert bool((column[:, ~mask] == 0).all()), "pads"
    P = {name: torch.stack([solved(factors, name, q, damping) for q in Q[name]]) for name in layers}
    expected = sum(torch.einsum("qoi,moi->qm", P[name], G[name]) for name in layers)
    assert float((whole.double() - expected).abs().max()) <= (1e-8 if case.exact else 2e-3) * float(size), "definition"


def gradients_frozen(model):
    from helpers.layers import frozen
    return frozen(model)


def _real(examples, width):
    return [torch.arange(width) < len(ids) for ids, _ in examples]


def inverse(d_out, d_in, seed, damping, dtype):
    """2. P against the dense solve; P(G_damped V) = V."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    Q_A, Q_S = torch.linalg.qr(random(d_in, d_in))[0], torch.linalg.qr(random(d_out, d_out))[0]
    Lambda = torch.rand(d_out, d_in, dtype=torch.float64, generator=generator) + 1e-3
    factors = EKFACFactors({"l": Q_A}, {"l": Q_S}, {"l": Q_A}, {"l": Q_S}, {"l": Lambda}, 1, 1)
    V = random(2, d_out, d_in)
    rtol = 1e-9 if dtype is torch.float64 else 1e-4
    close = lambda x, y: bool((x.double() - y).norm() <= rtol * y.norm())
    ours = factors.ihvp({"l": V.to(dtype)}, damping)["l"]
    assert ours.dtype is dtype
    for got, v in zip(ours, V):
        assert close(got, solved(factors, "l", v, damping)), "dense solve"
        added = 0.1 * float(Lambda.mean()) if damping is None else damping
        forth = (dense(factors, "l", added) @ v.T.flatten()).reshape(d_in, d_out).T
        assert close(factors.ihvp({"l": forth.to(dtype)}, damping)["l"], v), "there and back"


def definitions(case):
    """2 and the factors: A, S and Λ with true labels are their sums, Λ that of squares of whole sequences."""
    model, examples = model_of(case), examples_of(case)
    layers = linear_layers(model, case.pattern)
    factors = fit_ekfac(model, tiny.batches(examples, case.size, case.pads), layers, labels="true", **QUIET)
    G = by_autograd(model, layers, examples)
    largest = max(float(g.norm()) for g in G.values())
    for name in layers:
        A = S = 0
        for ids, labels in examples:
            a, ds = inputs_and_outputs(model, name, ids, labels)
            A, S = A + a.T @ a, S + ds.T @ ds
        tokens = sum(len(ids) for ids, _ in examples)
        assert near(case, factors.A[name], A / tokens), "moments"
        assert near(case, factors.S[name], S / tokens, size=largest**2), "moments"
        Lambda = (factors.Q_S[name].T @ G[name] @ factors.Q_A[name]).square().mean(0)
        assert near(case, factors.Lambda[name], Lambda, size=largest**2), "eigenvalues"


def inputs_and_outputs(model, name, ids, labels):
    """ā [T, d_in (+1)] and Ds [T, d_out] in float64, by a hook of its own and autograd."""
    seen, module = {}, model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, inputs, output: seen.update(a=inputs[0][0], s=output))
    loss = tiny.loss_of(model, ids, labels)
    handle.remove()
    ds = torch.autograd.grad(loss, seen["s"])[0][0]
    a = seen["a"].detach()
    return (a if module.bias is None else torch.cat([a, a.new_ones(len(a), 1)], 1)).double(), ds.double()


def fisher(classes, counts, d_in, bias, seed):
    """3. One softmax layer with constant inputs and labels that follow p exactly: EK-FAC = Gauss-Newton."""
    counts, generator = counts[:classes], torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, classes, bias=bias)).double()
    x = torch.randn(d_in, generator=generator).double()
    p = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    with torch.no_grad():  # weights for which the model's p is that of the labels
        model[0].weight.copy_(torch.randn(classes, d_in, generator=generator))
        left = p.log() - model[0].weight @ x
        model[0].bias.copy_(left) if bias else model[0].weight.add_(torch.outer(left, x) / (x @ x))
    labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(counts))
    task = lambda model, batch: (model(batch["inputs"]), batch["labels"])
    batch = {"inputs": x.expand(len(labels), -1).clone(), "labels": labels}
    factors = fit_ekfac(model, [batch], ["0"], task=task, labels="true", **QUIET)
    ones = torch.cat([x, x.new_ones(1)]) if bias else x
    exact = torch.kron(torch.outer(ones, ones), torch.diag(p) - torch.outer(p, p))
    assert float((rotation_free(factors, "0") - exact).norm()) <= 1e-9 * float(exact.norm()), "Gauss-Newton"
    many = {"inputs": x.expand(2000, -1).clone(), "labels": torch.zeros(2000, dtype=torch.long)}
    many["inputs"][:, 0] += torch.arange(2000) * 1e-12  # draws are keyed by the inputs
    drawn = rotation_free(fit_ekfac(model, [many], ["0"], task=task, seed=seed, **QUIET), "0")
    assert float((drawn - exact).norm()) <= 0.25 * float(ones @ ones), "Monte Carlo"


def invariance(case, labels):
    """4. Pads, sizes and order of batches change nothing; Conv1D = Linear; the fast head = the general path."""
    model, examples = model_of(case), examples_of(case)
    layers, queries = linear_layers(model, case.pattern), tiny.batches(examples_of(case, 1), 2)
    labels = labels if case.exact else "true"  # in float32 a draw may fall on the other side of a tie
    fit = lambda batches, model=model, task=causal_lm: fit_ekfac(
        model, batches, layers, labels=labels, task=task, **QUIET)
    one = tiny.batches(examples, 1)
    factors = fit(one)
    free = replace(factors, fingerprint="")  # that of Conv1D's weights is of their transposes
    score = lambda train, model=model, task=causal_lm: influence(
        model, free, queries, train, task=task, damping=damping_of(case, free), **QUIET)
    whole = score(one)
    others = {"size": tiny.batches(examples, case.size, case.pads), "pads": tiny.batches(examples, len(examples), 4),
              "order": tiny.batches(examples[::-1], case.size)}  # fmt: skip
    for what, batches in others.items():
        other = fit(batches)
        assert equal_factors(case, factors, other), what
        turned = whole.flip(1) if what == "order" else whole
        assert near(case, score(batches), turned, rtol=1e-7, loose=2e-2), what
    general = lambda model, batch: causal_lm(model, batch)
    assert equal_factors(case, factors, fit(others["size"], task=general)), "fast head"
    assert near(case, score(others["size"], task=general), whole, rtol=1e-7, loose=2e-2), "fast head"
    if case.kind == "gpt2":
        assert equal_factors(case, factors, fit(one, linear_twin(model))), "Conv1D"
        assert near(case, score(one, linear_twin(model)), whole, rtol=1e-7, loose=2e-2), "Conv1D"


def linear_twin(model):
    """The same GPT-2 with nn.Linear in place of Conv1D."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linear = nn.Linear(d_in, d_out, dtype=module.weight.dtype)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data.clone()
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, linear)
    return twin.eval()


def alignment(case, task=causal_lm):
    """5. Our summed loss = transformers' mean loss × the number of targets = the definition."""
    model, examples = model_of(case), examples_of(case)
    for batch in tiny.batches(examples, case.size, case.pads):
        with torch.no_grad():
            ours, targets = summed_loss(*task(model, batch)), int((batch["labels"][:, 1:] != IGNORED).sum())
            assert torch.allclose(ours.double(), targets * model(**batch).loss.double(), rtol=1e-5), "its loss"
    with torch.no_grad():
        expected = sum(tiny.loss_of(model, *example) for example in examples)
        total = sum(summed_loss(*task(model, batch)) for batch in tiny.batches(examples, case.size))
    assert torch.allclose(total.double(), expected.double(), rtol=1e-5), "definition"


def sign(case):
    """6. The step θ ← θ − η P(∇L_m) changes L_q by −η I(q, m) to first order."""
    model, (query, *_), examples = model_of(case), examples_of(case, 1), examples_of(case)
    layers = linear_layers(model, case.pattern)
    train = tiny.batches(examples, case.size)
    factors = fit_ekfac(model, train, layers, **QUIET)
    score = float(influence(model, factors, tiny.batches([query]), tiny.batches(examples[:1]), **QUIET))
    G, Q = by_autograd(model, layers, examples[:1]), by_autograd(model, layers, [query])
    steps = {name: solved(factors, name, G[name][0]) for name in layers}
    eta, eps, slope, allowed = 1e-4, 2e-16, 0.0, 0.0
    for name, step in steps.items():  # a unit direction for each layer: steps differ by orders of magnitude
        direction, length = {name: step / step.norm()}, float(step.norm())
        near, far = (central(model, direction, query, by) for by in (eta / 2, eta))
        slope += length * (4 * near - far) / 3  # Richardson: the error is O(η⁴)
        allowed += length * (1e-5 * float(Q[name].norm()) + eps * tiny.loss_of(model, *query).item() / eta)
    assert abs(slope + score) <= allowed, "sign"


def central(model, steps, query, eta):
    """The central difference of the query's loss along minus the steps."""
    with torch.no_grad():
        moved = [float(tiny.loss_of(stepped(model, steps, sign * eta), *query)) for sign in (1, -1)]
    return (moved[0] - moved[1]) / (2 * eta)


def stepped(model, steps, eta):
    """A copy of the model at θ − η step."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, step in steps.items():
            module = twin.get_submodule(name)
            weight = step if module.bias is None else step[:, :-1]
            module.weight -= eta * (weight.T if isinstance(module, Conv1D) else weight)
            if module.bias is not None:
                module.bias -= eta * step[:, -1]
    return twin


FLOAT64 = CASES.filter(lambda case: case.exact and case.kind == "gpt2")  # Llama's norms compute in float32
COUNTS = st.lists(st.integers(1, 9), min_size=5, max_size=5)
PROPERTIES = {
    "gradients and sums": (gradients_and_sums, {"case": CASES}),
    "inverse": (inverse, {"d_out": st.integers(1, 7), "d_in": st.integers(1, 7), "seed": st.integers(0, 9999),
                          "damping": st.sampled_from([None, 0.0, 1e-3, 1.0, 1e3]),
                          "dtype": st.sampled_from([torch.float64, torch.float32])}),
    "definitions": (definitions, {"case": CASES}),
    "fisher": (fisher, {"classes": st.integers(2, 5), "counts": COUNTS, "d_in": st.integers(1, 4),
                        "bias": st.booleans(), "seed": st.integers(0, 9999)}),
    "invariance": (invariance, {"case": CASES, "labels": st.sampled_from(["sampled", "true"])}),
    "alignment": (alignment, {"case": CASES}),
    "sign": (sign, {"case": FLOAT64}),
}  # fmt: skip


def run(name, examples=EXAMPLES, **fixed):
    """Checks a property on as many random cases, the same ones every time but with PROPERTY_EXAMPLES; a case that fails
    is not made smaller."""
    check, strategies = PROPERTIES[name]
    quick = settings(max_examples=examples, derandomize=not SOAK, deadline=None, database=None, phases=[Phase.generate],
                     report_multiple_bugs=False, suppress_health_check=list(HealthCheck))  # fmt: skip
    quick(given(**strategies)(lambda **drawn: check(**drawn, **fixed)))()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    run(name)


# Mutants: each of these mistakes must break the property beside it ---------------------------------------------------


def transposed(self, V, damping=None):
    return {name: (self.Q_S[name].T @ ((self.Q_S[name] @ v.double() @ self.Q_A[name].T) / self.damped(name, damping))
                   @ self.Q_A[name]).to(v) for name, v in V.items()}  # fmt: skip


def multiplied(self, V, damping=None):
    return {name: (self.Q_S[name] @ ((self.Q_S[name].T @ v.double() @ self.Q_A[name]) * self.damped(name, damping))
                   @ self.Q_A[name].T).to(v) for name, v in V.items()}  # fmt: skip


def undamped(self, V, damping=None):
    return {name: (self.Q_S[name] @ ((self.Q_S[name].T @ v.double() @ self.Q_A[name]) / self.Lambda[name])
                   @ self.Q_A[name].T).to(v) for name, v in V.items()}  # fmt: skip


def reversed_sign(self, V, damping=None):
    return {name: -value for name, value in IHVP(self, V, damping).items()}


def per_token_squares(a, ds, q_a, q_s):
    return ((ds @ q_s).square().transpose(1, 2) @ (a @ q_a).square()).sqrt()


def shifted_twice(model, batch):
    logits, labels = causal_lm(model, batch)
    return logits, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def not_shifted(model, batch):
    logits, _ = causal_lm(model, batch)
    return logits, batch["labels"][:, :-1]


def without_mask(model, batch, name, a, grad):
    return ONE_LAYER(model, {key: value for key, value in batch.items() if key != "attention_mask"}, name, a, grad)


def without_bias(model, batch, name, a, grad):
    a, grad, real = ONE_LAYER(model, batch, name, a, grad)
    if model.get_submodule(name).bias is not None:
        a = torch.cat([a[..., :-1], 0 * a[..., -1:]], -1)
    return a, grad, real


def without_bias_forwards(model, directions):
    weights, tangents = STUDIED(model, directions)
    return weights, {name: value * name.endswith("weight") for name, value in tangents.items()}


def keyed_by_row(batch, targets, seed):
    """Draws that depend on where in a batch an example stands."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(targets.shape, dtype=torch.float64, generator=generator)


def mean_loss(outputs, targets):
    return summed_loss(outputs, targets) / targets.ne(IGNORED).sum()


IHVP, ONE_LAYER, STUDIED = EKFACFactors.ihvp, gradients._one_layer, output_tokens._studied
MUTANTS = {
    "transposed Q": ("inverse", EKFACFactors, "ihvp", transposed),
    "multiplied, not divided": ("inverse", EKFACFactors, "ihvp", multiplied),
    "damping left out": ("inverse", EKFACFactors, "ihvp", undamped),
    "transposed Q in a score": ("gradients and sums", EKFACFactors, "ihvp", transposed),
    "sign reversed": ("sign", EKFACFactors, "ihvp", reversed_sign),
    "squares token by token": ("definitions", ekfac, "rotated_gradients", per_token_squares),
    "squares token by token, Gauss-Newton": ("fisher", ekfac, "rotated_gradients", lambda a, ds, q_a, q_s:
                                             per_token_squares(a, ds, q_a, q_s) * 1.1),
    "missing mask": ("invariance", gradients, "_one_layer", without_mask),
    "missing mask in the moments": ("definitions", gradients, "_one_layer", without_mask),
    "bias left out": ("gradients and sums", gradients, "_one_layer", without_bias),
    "bias left out in forward mode": ("gradients and sums", output_tokens, "_studied", without_bias_forwards),
    "draws by place in the batch": ("invariance", gradients, "keyed_uniforms", keyed_by_row),
    "mean loss": ("gradients and sums", gradients, "summed_loss", mean_loss),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_each_mistake_breaks_a_property(mistake, monkeypatch):
    name, place, attribute, mutant = MUTANTS[mistake]
    monkeypatch.setattr(place, attribute, mutant)
    with pytest.raises(AssertionError):
        run(name)


@pytest.mark.parametrize("task", [shifted_twice, not_shifted])
@pytest.mark.parametrize("name", ["alignment", "gradients and sums"])
def test_labels_shifted_twice_or_not_at_all_break_a_property(task, name):
    with pytest.raises((AssertionError, ValueError)):  # ValueError: nothing left to learn from, all Λ zero
        run(name, task=task)
