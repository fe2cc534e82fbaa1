"""EK-FAC factors of the Gauss-Newton matrix, layer by layer (George et al. 2018; Grosse et al. 2023, section 2.2)."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .gradients import TokenGradients, by_length, check_targets, finite, has_fast_head, token_gradients
from .layers import frozen, layer_shapes
from .tasks import causal_lm

KEEP_BYTES = 1 << 30  # of gradients kept for the second pass, and as much again of ∂L/∂h; the rest runs anew
MATRICES = ("A", "S", "Q_A", "Q_S", "Lambda")


@dataclass(frozen=True)
class EKFACFactors:
    """Factors by layer, float64. A [d_in (+1)]², S [d_out]²: second moments of ā and Ds, means over real positions;
    Q_A, Q_S: their eigenvectors in columns; Lambda [d_out, d_in (+1)]: second moments of the rotated whole-sequence
    gradients, means over examples. n_tokens counts real positions; `pooled` names layers without a token axis, whose
    count is n_examples. `fingerprint` is that of the weights the factors were fitted at ("" is not checked).
    """

    A: dict
    S: dict
    Q_A: dict
    Q_S: dict
    Lambda: dict
    n_examples: int
    n_tokens: int
    pooled: tuple = ()
    fingerprint: str = ""

    def ihvp(self, gradients, damping=None):
        """P(V) = Q_S [(Q_Sᵀ V Q_A) ⊘ (Lambda + damping)] Q_Aᵀ (Grosse et al. 2023, equations 20-21, transposes mended).

        gradients: {layer: [..., d_out, d_in (+1)]}, the bias column last; the same comes back, in the same dtype.
        damping: None means 0.1 × mean(Lambda) of each layer; a float is added as it is. The arithmetic is float64.
        """
        out = {}
        for name, gradient in gradients.items():
            Q_A, Q_S = self.Q_A[name], self.Q_S[name]
            rotated = Q_S.T @ gradient.to(Q_S) @ Q_A
            out[name] = (Q_S @ (rotated / self.damped(name, damping)) @ Q_A.T).to(gradient)
        return out

    def damped(self, name, damping=None):
        """Lambda + damping of one layer; raises ValueError where the damping is below zero or an entry is not above."""
        Lambda = self.Lambda[name]
        added = 0.1 * Lambda.mean() if damping is None else damping
        if not added >= 0:
            raise ValueError(f"damping must be None or a number of at least 0, got {damping}")
        if not bool((Lambda + added > 0).all()):
            raise ValueError(f"damping={damping} leaves zero eigenvalues in Lambda of {name!r}, which cannot be "
                             "divided by: give a damping above 0")
        return Lambda + added

    def save(self, directory):
        """Writes `factors.safetensors` in `directory` (made if need be)."""
        tensors = {f"{matrix}/{name}": value.contiguous() for matrix in MATRICES
                   for name, value in getattr(self, matrix).items()}
        meta = {"n_examples": self.n_examples, "n_tokens": self.n_tokens, "pooled": list(self.pooled),
                "fingerprint": self.fingerprint, "layers": list(self.A)}
        path = Path(directory) / "factors.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"ekfac": json.dumps(meta)})
        partial.replace(path)

    @staticmethod
    def load(directory):
        """The factors that `save` wrote; raises FileNotFoundError or ValueError where there are none."""
        path = Path(directory) / "factors.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"directory: {str(directory)!r} has no factors.safetensors; save makes it")
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("ekfac", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"directory: {str(path)!r} cannot be read ({error}); save the factors again") from error
        if meta is None:
            raise ValueError(f"directory: {str(path)!r} was not written by EKFACFactors.save")
        parts = {m: {name: tensors[f"{m}/{name}"] for name in meta["layers"]} for m in MATRICES}
        return EKFACFactors(**parts, n_examples=meta["n_examples"], n_tokens=meta["n_tokens"],
                            pooled=tuple(meta["pooled"]), fingerprint=meta["fingerprint"])


def fit_ekfac(model, batches, layers, task=causal_lm, labels="sampled", seed=0, progress=True):
    """Fits EKFACFactors on `batches`, in two passes: second moments and eigenvectors, then eigenvalues.

    labels: "sampled" draws every target from the model's own predictions (true Fisher = Gauss-Newton for softmax),
    keyed by `seed`; "true" takes the labels of the batch (empirical Fisher, another matrix). The model comes back as
    it was. Raises ValueError for unknown layers or labels, empty batches, sequences without a target, gradients that
    are not finite (which layer, which batch).
    """
    if labels not in ("sampled", "true"):
        raise ValueError(f"labels must be 'sampled' or 'true', got {labels!r}")
    shapes = layer_shapes(model, layers)
    check_targets(batches, task, "batches")
    groups = by_length(batches)
    with frozen(model):
        fast = has_fast_head(model, groups[0][1], layers, task)
        gradients = partial(token_gradients, model, layers=layers, task=task, fast=fast,
                            seed=seed if labels == "sampled" else None)
        A, S, counts, kept = _second_moments(groups, shapes, gradients, progress)
        A, S = ({name: total[name] / counts[name] for name in layers} for total in (A, S))
        Q_A, Q_S = ({name: torch.linalg.eigh(matrix[name])[1] for name in layers} for matrix in (A, S))
        Lambda = _eigenvalues(groups, Q_A, Q_S, gradients, kept, progress)
    n = sum(len(rows) for rows, _ in groups)
    pooled = tuple(name for name in layers if counts[name] == n)
    return EKFACFactors(A, S, Q_A, Q_S, {name: Lambda[name] / n for name in layers}, n, max(counts.values()),
                        pooled if max(counts.values()) > n else (), fingerprint(model, layers))


def _second_moments(groups, shapes, gradients, progress):
    """Sums of ā āᵀ and Ds Dsᵀ over real positions, their number by layer, and what fits of each group's gradients."""
    A, S, counts, kept = dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0), []
    whole = top = 0
    for rows, batch in tqdm(groups, "second moments", disable=not progress):
        got = gradients(batch)
        for name in shapes:
            a, ds = got.inputs[name].flatten(0, 1), got.outputs[name].flatten(0, 1)
            A[name] = A[name] + finite(a.T @ a, name, rows).double()
            S[name] = S[name] + finite(ds.T @ ds, name, rows).double()
            counts[name] += len(a) if got.real[name] is None else int(got.real[name].sum())
        whole += sum(x.nbytes for part in (got.inputs, got.outputs) for x in part.values())
        top += 0 if got.hidden is None else got.hidden.nbytes
        kept.append(got if whole <= KEEP_BYTES else got.hidden if top <= KEEP_BYTES else None)
    return A, S, counts, kept


def _eigenvalues(groups, Q_A, Q_S, gradients, kept, progress):
    """Sums over examples of (Q_Sᵀ G Q_A)², G the gradient of the whole sequence."""
    Lambda = {name: torch.zeros(len(Q_S[name]), len(Q_A[name]), dtype=torch.float64, device=Q_S[name].device)
              for name in Q_A}
    cast = {}
    for number, (rows, batch) in enumerate(tqdm(groups, "eigenvalues", disable=not progress)):
        got, kept[number] = kept[number], None
        got = got if isinstance(got, TokenGradients) else gradients(batch, hidden=got)
        for name in Q_A:
            a, ds = got.inputs[name], got.outputs[name]
            q_a, q_s = cast.setdefault(name, (Q_A[name].to(a), Q_S[name].to(a)))
            Lambda[name] += finite(rotated_gradients(a, ds, q_a, q_s).square_().sum(0), name, rows)
    return Lambda


def rotated_gradients(a, ds, q_a, q_s):
    """Q_Sᵀ (Σ_t Ds_t ā_tᵀ) Q_A, [B, d_out, d_in (+1)]; each side is turned before or after the sum, what is cheaper."""
    tokens = a.shape[1]
    a_first, s_first = tokens < ds.shape[2], tokens < a.shape[2]
    a, ds = a @ q_a if a_first else a, ds @ q_s if s_first else ds
    gradient = ds.transpose(1, 2) @ a
    gradient = gradient if a_first else gradient @ q_a
    return gradient if s_first else q_s.T @ gradient


def fingerprint(model, layers):
    """A digest of the studied weights: factors belong to one model."""
    digest = hashlib.blake2b(digest_size=16)
    for name in layers:
        weight = model.get_submodule(name).weight.detach().float().cpu().contiguous()
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()
