"""EK-FAC factors of the Gauss-Newton matrix, layer by layer (George et al. 2018; Grosse et al. 2023, section 2.2)."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import Checkpoint, accumulate, digest_of, job_of, replace, sums
from .examples import check_targets, digest_tensors
from .gradients import fastest_gradients, finite
from .layers import frozen, layer_shapes
from .ranks import add_up, eigenvectors
from .tasks import causal_lm

KEEP_BYTES = 1 << 30  # of gradients kept for the second pass, and as much again of ∂L/∂h; the rest runs anew
ROUNDING = 1e-14  # of a layer's largest eigenvalue: below it, an undamped one is noise
NOISE = 1e-13  # of the largest layer's mean eigenvalue: below it, a layer's gradients are float32's rounding
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
        damping: None means 0.1 × mean(Lambda) of each layer; a float is added as it is, and so is each layer's own from
        {layer: float}. The arithmetic is float64. Raises ValueError for layers that are not among the factors, for
        gradients of another shape, and as `damped`.
        """
        out = {}
        for name, gradient in gradients.items():
            if name not in self.Lambda or gradient.shape[-2:] != self.Lambda[name].shape:
                there = {layer: tuple(Lambda.shape) for layer, Lambda in self.Lambda.items()}
                raise ValueError(f"gradients: {name!r} is {tuple(gradient.shape)}; the last two axes must be those of "
                                 f"the factors, {there}")
            Q_A, Q_S = self.Q_A[name], self.Q_S[name]
            rotated = Q_S.T @ gradient.to(Q_S) @ Q_A
            out[name] = (Q_S @ (rotated / self.damped(name, damping)) @ Q_A.T).to(gradient)
        return out

    def damped(self, name, damping=None):
        """Lambda + damping of one layer; raises ValueError for a damping below zero, one that lacks the layer, where
        an entry of the sum is not above zero, and for None as `mean_eigenvalue`."""
        Lambda = self.Lambda[name]
        if isinstance(damping, dict):
            if name not in damping:
                raise ValueError(f"damping has {sorted(damping)} and lacks {name!r}: give every layer's, or one number")
            damping = damping[name]
        added = 0.1 * self.mean_eigenvalue(name) if damping is None else damping
        if isinstance(added, str) or not added >= 0:
            raise ValueError(f"damping must be None or a number of at least 0, got {damping}")
        least = 0 if added > 0 else ROUNDING * Lambda.max()
        if not bool((Lambda + added > least).all()):
            raise ValueError(f"damping={damping} leaves zero eigenvalues in Lambda of {name!r}, up to rounding, which "
                             "cannot be divided by: give a damping above 0, or leave the layer out")
        return Lambda + added

    @cached_property
    def _means(self):
        return {name: float(Lambda.mean()) for name, Lambda in self.Lambda.items()}

    def mean_eigenvalue(self, name):
        """mean(Lambda) of a layer, the unit of damping=None; ValueError where it is rounding beside another layer's, so
        that scores would be 0/0, of any size (attention that sees one key gives queries and keys no gradient)."""
        largest = max(self._means, key=self._means.get)
        if 0 < self._means[name] < NOISE * self._means[largest]:
            raise ValueError(f"factors: the gradients of {name!r} are zero but for rounding (mean(Lambda) is "
                             f"{self._means[name]:.0e}, that of {largest!r} {self._means[largest]:.0e}), and so would "
                             "be a damping relative to them: leave the layer out, or give damping as a number")
        return self._means[name]

    def save(self, directory):
        """Writes `factors.safetensors` in `directory` (made if need be)."""
        tensors = {f"{matrix}/{name}": value.contiguous() for matrix in MATRICES
                   for name, value in getattr(self, matrix).items()}
        meta = {"n_examples": self.n_examples, "n_tokens": self.n_tokens, "pooled": list(self.pooled),
                "fingerprint": self.fingerprint, "layers": list(self.A)}
        meta["digest"] = _digest(tensors, meta)
        path = Path(directory) / "factors.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda partial: save_file(tensors, partial, {"ekfac": json.dumps(meta)}))

    @staticmethod
    def load(directory):
        """The factors that `save` wrote; FileNotFoundError where there are none, ValueError where they are damaged."""
        path = Path(directory) / "factors.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"directory: {str(directory)!r} has no factors.safetensors; save makes it")
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("ekfac", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"directory: {str(path)!r} cannot be read ({error}); save the factors again") from error
        if not isinstance(meta, dict):
            raise ValueError(f"directory: {str(path)!r} was not written by EKFACFactors.save")
        if meta.pop("digest", None) != _digest(tensors, meta):
            raise ValueError(f"directory: {str(path)!r} is damaged (not what was saved); save the factors again")
        parts = {m: {name: tensors[f"{m}/{name}"] for name in meta["layers"]} for m in MATRICES}
        return EKFACFactors(**parts, n_examples=meta["n_examples"], n_tokens=meta["n_tokens"],
                            pooled=tuple(meta["pooled"]), fingerprint=meta["fingerprint"])


def fit_ekfac(model, batches, layers, task=causal_lm, labels="sampled", seed=0, checkpoint=None, progress=True):
    """Fits EKFACFactors on `batches`, in two passes: second moments and eigenvectors, then eigenvalues.

    labels: "sampled" draws every target from the model's own predictions (true Fisher = Gauss-Newton for softmax),
    keyed by `seed`; "true" takes the labels of the batch (empirical Fisher, another matrix). checkpoint: a folder for
    the running sums; the same call after a kill goes on from there and ends with the same numbers. Where
    torch.distributed is at work, `batches` are this rank's share, and every rank gets the factors of all. The model
    comes back as it was; parameters that require no gradients count all the same. Raises ValueError for unknown layers
    or labels, a task that returns anything but outputs and targets, empty batches, sequences without a target,
    gradients that are not finite (which layer, which batch), and a checkpoint that is damaged or of another job.
    """
    if labels not in ("sampled", "true"):
        raise ValueError(f"labels must be 'sampled' or 'true', got {labels!r}")
    shapes, data = layer_shapes(model, layers), None if checkpoint is None else hashlib.blake2b(digest_size=16)
    examples, _ = check_targets(batches, task, "batches", data)
    if checkpoint is not None:
        values = {"layers": list(layers), "labels": labels, "seed": str(seed) if labels == "sampled" else None}
        checkpoint = Checkpoint(Path(checkpoint), job_of(model, task, data, values))
    with frozen(model):
        gradients = partial(fastest_gradients(model, layers, task), seed=seed if labels == "sampled" else None)
        fold = partial(accumulate, batches, examples, checkpoint=checkpoint, progress=progress)
        total, kept = _second_moments(shapes, gradients, fold, model.get_submodule(layers[0]).weight.device)
        n, counts = int(total["n"]), {name: int(total["count", name]) for name in layers}
        A, S = ({name: total[side, name].div_(counts[name]) for name in layers} for side in "AS")
        Q_A, Q_S = eigenvectors(A), eigenvectors(S)
        Lambda = _eigenvalues(Q_A, Q_S, gradients, kept, fold, checkpoint is not None)
    tokens = max(counts.values())
    pooled = tuple(name for name in layers if counts[name] == n) if tokens > n else ()
    return EKFACFactors(A, S, Q_A, Q_S, {name: Lambda[name].div_(n) for name in layers}, n, tokens, pooled,
                        fingerprint(model))


def _second_moments(shapes, gradients, fold, device):
    """({what: sum}, {first row: gradients}): ā āᵀ and Ds Dsᵀ over real positions, their number; what fits of a group.

    The sums, by ("A", layer), ("S", layer), ("count", layer) and "n" examples, are those of all ranks. What is kept:
    {layer: `_compact` gradients}, or only ∂L/∂h where that has the room, or None.
    """
    sizes = {(side, name): (size, size) for name, shape in shapes.items() for side, size in zip("SA", shape)}
    flat, total = sums(sizes | {("count", name): () for name in shapes} | {"n": ()}, device)
    kept, held = {}, [0, 0]

    def add(rows, batch):
        got = gradients(batch)
        for name in shapes:
            a, ds, real = got.inputs[name].flatten(0, 1), got.outputs[name].flatten(0, 1), got.real[name]
            total["A", name] += finite(a.T @ a, name, rows).to(flat)
            total["S", name] += finite(ds.T @ ds, name, rows).to(flat)
            total["count", name] += len(a) if real is None else int(real.sum())
        total["n"] += len(rows)
        compact = {}
        if held[0] <= KEEP_BYTES:
            compact = {name: _compact(got.inputs[name], got.outputs[name]) for name in shapes}
            held[0] += sum(x.nbytes for part in compact.values() for x in part)
        held[1] += 0 if got.hidden is None else got.hidden.nbytes
        kept[int(rows[0])] = compact if held[0] <= KEEP_BYTES else got.hidden if held[1] <= KEEP_BYTES else None

    fold(flat, add, name="second moments")
    add_up(flat)
    return total, kept


def _eigenvalues(Q_A, Q_S, gradients, kept, fold, saved):
    """{layer: sum over all examples of (Q_Sᵀ G Q_A)²}, G the gradient of the whole sequence."""
    flat, Lambda = sums({name: (len(Q_S[name]), len(Q_A[name])) for name in Q_A}, next(iter(Q_A.values())).device)

    def add(rows, batch):
        parts = kept.pop(int(rows[0]), None)
        if not isinstance(parts, dict):
            got = gradients(batch, hidden=parts)
            parts = {name: (got.inputs[name], got.outputs[name]) for name in Q_A}
        for name, part in parts.items():
            q_a, q_s = Q_A[name].to(part[0]), Q_S[name].to(part[0])
            turned = q_s.T @ (part[0] @ q_a) if len(part) == 1 else rotated_gradients(*part, q_a, q_s)
            Lambda[name] += finite(turned.square_().sum(0), name, rows).to(flat)

    key = digest_of(Q_A) + digest_of(Q_S) if saved else ""
    fold(flat, add, name="eigenvalues", key=key)
    add_up(flat)
    return Lambda


def _compact(a, ds):
    """(ā, Ds), or where `rotated_gradients` sums over tokens before it turns, that sum, which takes less memory."""
    return (ds.transpose(1, 2) @ a,) if a.shape[1] >= max(a.shape[2], ds.shape[2]) else (a, ds)


def rotated_gradients(a, ds, q_a, q_s):
    """Q_Sᵀ (Σ_t Ds_t ā_tᵀ) Q_A, [B, d_out, d_in (+1)]; each side is turned before or after the sum, what is cheaper."""
    tokens = a.shape[1]
    a_first, s_first = tokens < ds.shape[2], tokens < a.shape[2]
    a, ds = a @ q_a if a_first else a, ds @ q_s if s_first else ds
    gradient = ds.transpose(1, 2) @ a
    gradient = gradient if a_first else gradient @ q_a
    return gradient if s_first else q_s.T @ gradient


def _digest(tensors, meta):
    """A digest of all that a file of factors holds."""
    told = json.dumps(meta, sort_keys=True) + digest_of({key: tensors[key] for key in sorted(tensors)})
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def fingerprint(model):
    """A digest of all weights in float32, since all of them shape the gradients: factors belong to one model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest_tensors({name: parameter.float()}, digest)
    return digest.hexdigest()
