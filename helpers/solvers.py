"""x ≈ (H + damping I)⁻¹ v by products with H alone: conjugate gradient, LiSSA, Arnoldi and Nyström.

v is one vector [P] or one a column, [P, k]. matvec maps u to H u, undamped; H is symmetric. `cg` and `lissa` call it
with tensors of v's shape, `arnoldi` and `nystrom` with vectors [P]. A size per vector is a Euclidean norm.
"""

import inspect
from dataclasses import dataclass

import torch

BATCHES, POWER_STEPS = 16, 15  # what a failed solve spends on finding out what would have worked
RUNAWAY = 100  # times the norm that a convergent LiSSA cannot exceed


@dataclass(frozen=True)
class Solution:
    """x, of v's shape, and residuals, a float64 tensor whose meaning each solver states."""

    x: torch.Tensor
    residuals: torch.Tensor


def cg(matvec, v, damping=0.0, tolerance=None, max_steps=1000, preconditioner=None):
    """Conjugate gradient (Hestenes & Stiefel 1952) for a positive definite H + damping I; exact after P steps.

    residuals[j]: ‖v − (H + damping I) x_j‖ / ‖v‖ as the recursion has it, [steps + 1], of the worst column; it stops at
    `tolerance` (None: 1e-10, or 1e-5 below float64). preconditioner: r -> M⁻¹ r, M symmetric positive definite.
    Raises ValueError, with a damping to use, where it meets a direction of zero or negative curvature; with the
    residual reached, where max_steps are not enough; for shapes that do not match.
    """
    A, precondition = _operator(matvec, v, damping), _checked(preconditioner or torch.clone, v, "preconditioner")
    tolerance = tolerance or (1e-10 if v.dtype == torch.float64 else 1e-5)
    size = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
    x, r, p, rz, largest, residuals = torch.zeros_like(v), v.clone(), torch.zeros_like(v), None, 0.0, []
    while True:
        relative = r.norm(dim=0) / size
        residuals.append(float(relative.max()))
        open_ = relative > tolerance  # the columns still to be solved
        if not bool(open_.any()):
            return Solution(x, torch.tensor(residuals, dtype=torch.float64))
        if len(residuals) > max_steps:
            raise ValueError(f"max_steps={max_steps}: CG reached a relative residual of {residuals[-1]:.2g}, not "
                             f"tolerance={tolerance:g}; give more steps, a damping above {damping:g}, a preconditioner")
        z, before = precondition(r), rz
        rz = (r * z).sum(0)
        p = z if before is None else z + torch.where(open_, rz / before, 0.0) * p
        Ap = A(p)
        curvature = (p * Ap).sum(0) / p.square().sum(0)
        largest = max(largest, float(curvature[open_].max()))
        if not bool((curvature[open_] > torch.finfo(v.dtype).eps * largest).all()):
            raise _not_definite(A, p.reshape(len(v), -1)[:, int(torch.where(open_, curvature, torch.inf).argmin())],
                                damping, "CG")
        step = torch.where(open_, rz / (curvature * p.square().sum(0)), 0.0)
        x, r = x + step * p, r - step * Ap


def lissa(sample_matvec, v, damping=0.0, scale=1.0, depth=100, repeats=1, seed=0):
    """LiSSA (Agarwal et al. 2017): h ← v + h − (H_j + damping I) h / scale from h = v; x = h / scale, mean of repeats.

    sample_matvec(u) or sample_matvec(u, generator): H_j u on a batch that this very call draws, from the generator or,
    with one argument, from torch's own (torch.randint, …). Both are torch's CPU generator, seeded with seed + t for
    repeat t and put back afterwards; so repeats=T is the mean of T calls with repeats=1 and seeds seed … seed + T − 1.
    residuals: step sizes ‖h_{j+1} − h_j‖ / ‖h_{j+1}‖, [repeats, depth]; on small batches they stop at a noise floor.
    Raises ValueError where h runs away or its steps still grow at the end, with the scale to use, or with the damping
    where H is negative along the direction that grows; for shapes that do not match, a scale that is not positive.
    """
    A = _operator(_sampler(sample_matvec), v, damping)
    if not scale > 0 or depth < 1 or repeats < 1:
        raise ValueError(f"scale={scale}, depth={depth}, repeats={repeats}: scale must be positive, the others >= 1")
    total, steps, sizes = torch.zeros_like(v), [], []
    with torch.random.fork_rng(devices=[]):
        for run in range(repeats):
            torch.default_generator.manual_seed(seed + run)
            h, step, size = _neumann(A, v, damping, scale, depth)
            total, steps, sizes = total + h / scale, [*steps, step], [*sizes, size]
            if len(step) < depth:
                raise _diverged(A, h, damping, scale, seed, f"at step {len(step)} of {depth}")
        steps, sizes = torch.tensor(steps, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
        late, end, eps = steps[:, depth // 2 : 3 * depth // 4], steps[:, 3 * depth // 4 :], torch.finfo(v.dtype).eps
        least = max(2 * late.median(), eps**0.5 * sizes.max())
        if depth > 3 and end.median() > least and end.quantile(0.05) > late.quantile(0.95):  # a noise floor overlaps
            raise _diverged(A, h, damping, scale, seed, f"slowly: its steps still grew after {depth}")
    return Solution(total / repeats, steps / sizes)


def arnoldi(matvec, v, damping=0.0, steps=100, rank=None, seed=0):
    """Σ_i q_i (q_iᵀ v) / (θ_i + damping) over Ritz pairs of H (Schioppa et al. 2022, section 3); exact for steps = P.

    The Krylov space of a random start (seed), fully reorthogonalised, has `steps` dimensions, cut to P; of
    its Ritz values θ the `rank` of largest magnitude are kept (None: all). What v has outside of them is dropped.
    residuals: [1], ‖v − (H + damping I) x‖ / ‖v‖ of the worst column, by one more product a column. Raises ValueError,
    with a damping to use, where a θ + damping is not positive; for shapes that do not match.
    """
    A = _operator(matvec, v, damping)
    start = torch.randn(len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(v)
    Q, T = _krylov(A, start, _at_least_one("steps", steps))
    values, vectors = torch.linalg.eigh(T)
    rank = len(values) if rank is None else _at_least_one("rank", rank)
    kept = (values - damping).abs().argsort(descending=True)[:rank]
    values, Q = values[kept], Q @ vectors[:, kept]
    if not values.min() > len(v) * torch.finfo(v.dtype).eps * values.abs().max():
        raise _not_definite(A, Q[:, values.argmin()], damping, "Arnoldi")
    return _solution(A, v, Q @ (Q.T @ v.reshape(len(v), -1) / values[:, None]))


def nystrom(matvec, v, damping, rank=100, seed=0):
    """(U Λ Uᵀ + damping I)⁻¹ v with U Λ Uᵀ = H Ω (Ωᵀ H Ω)⁺ (H Ω)ᵀ for a positive semi-definite H; exact for rank = P.

    Ω: a random orthonormal [P, rank] (seed; rank is cut to P), which costs `rank` products; the shifted Cholesky of
    Frangella, Tropp & Udell (2023, algorithm 2.1) keeps it stable. Outside of its sketch H counts as zero, so damping
    must be positive. residuals as in `arnoldi`. Raises ValueError where H is indefinite; for shapes that do not match.
    """
    H = _operator(matvec, v, 0.0)
    if not damping > 0:
        raise ValueError(f"damping={damping}: Nyström takes H as zero outside of its sketch; give a positive damping")
    rank = min(_at_least_one("rank", rank), len(v))
    noise = torch.randn(len(v), rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Omega = torch.linalg.qr(noise.to(v))[0]
    Y = torch.stack([H(column) for column in Omega.T], 1)
    core, shift = Omega.T @ Y, len(v) ** 0.5 * torch.finfo(v.dtype).eps * float(Y.norm())
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    if values[0] < -10 * shift:
        low = float(_ritz(H, Omega @ vectors[:, 0])[0])
        raise ValueError(f"matvec: H is indefinite, its curvature falls to {low:.2g}; Nyström needs a positive "
                         f"semi-definite one: give the Gauss-Newton matrix, or H u + c u with c = {_up(-low)} or more")
    root = vectors / (values.clamp_min(0) + 11 * shift).sqrt()
    U, singular, _ = torch.linalg.svd((Y + 11 * shift * Omega) @ root, full_matrices=False)
    Lambda, columns = (singular.square() - 11 * shift).clamp_min(0), v.reshape(len(v), -1)
    inside = U.T @ columns
    x = U @ (inside / (Lambda + damping)[:, None]) + (columns - U @ inside) / damping
    return _solution(lambda u: H(u) + damping * u, v, x)


def _neumann(A, v, damping, scale, depth):
    """(h, its step sizes, its sizes); fewer than depth where h ran away: if it converges, ‖h_j‖ ≤ (j + 1) ‖v‖."""
    h, steps, sizes, unit = v, [], [], float(v.norm())
    for j in range(depth):
        step = v - A(h) / scale
        size = float((h + step).norm())
        if not size <= RUNAWAY * min(j + 2, scale / damping if damping else torch.inf) * unit:
            return h, steps, sizes
        h = h + step
        steps.append(float(step.norm()))
        sizes.append(max(size, torch.finfo(v.dtype).tiny))
    return h, steps, sizes


def _diverged(A, h, damping, scale, seed, when):
    """The error that says what would have worked; seeding before a product holds its batch still."""
    def still(u, batch):
        torch.default_generator.manual_seed(seed + batch)
        return A(u.reshape(h.shape)).reshape(-1)

    mean = lambda u: sum(still(u, batch) for batch in range(BATCHES)) / BATCHES
    u = h.reshape(-1) / h.norm()
    if u @ mean(u) <= 0:
        return _not_definite(mean, u, damping, f"LiSSA diverged {when}: no scale helps;")
    largest = 0.0
    for batch in range(BATCHES):
        w = u
        for _ in range(POWER_STEPS):
            w = still(w / w.norm().clamp_min(torch.finfo(w.dtype).tiny), batch)
        largest = max(largest, float(w.norm()))
    return ValueError(f"scale={scale:g}: LiSSA diverged {when}; the largest eigenvalue of H + damping I on {BATCHES} "
                      f"batches is about {largest:.2g}: use scale={_up(max(largest, 2 * scale))} or more")


def _not_definite(A, direction, damping, who):
    low, high = _ritz(A, direction)
    kind = "singular" if abs(low) < len(direction) * torch.finfo(direction.dtype).eps * abs(high) else "indefinite"
    return ValueError(f"damping={damping:g}: {who} H + damping I is {kind}, its curvature falls to {low:.2g}; use "
                      f"damping={_up(damping - min(low, 0) + 0.01 * abs(high))} or more, or the Gauss-Newton matrix")


def _ritz(A, direction):
    """Estimates of the smallest and largest eigenvalue, from the Krylov space of a direction that shows the trouble."""
    values = torch.linalg.eigvalsh(_krylov(A, direction, POWER_STEPS)[1])
    return float(values[0]), float(values[-1])


def _krylov(A, start, steps):
    """Q [P, n], an orthonormal basis of span{s, A s, A² s, …}, and Qᵀ A Q; a space that closes goes on at random."""
    Q, generator = start.new_zeros(len(start), min(steps, len(start))), torch.Generator().manual_seed(0)
    AQ, w, largest = torch.zeros_like(Q), start, 0.0
    for n in range(Q.shape[1]):
        Q[:, n] = w / w.norm()
        AQ[:, n] = A(Q[:, n])
        largest = max(largest, float(AQ[:, n].norm()))
        w = _orthogonal(AQ[:, n], Q[:, : n + 1])
        if not w.norm() > len(w) * torch.finfo(w.dtype).eps * largest:
            w = _orthogonal(torch.randn(len(w), generator=generator).to(w), Q[:, : n + 1])
    T = Q.T @ AQ
    return Q, (T + T.T) / 2


def _orthogonal(w, Q):
    w = w - Q @ (Q.T @ w)
    return w - Q @ (Q.T @ w)  # once leaves rounding errors of the size of what is left


def _sampler(sample_matvec):
    """u -> H_j u: hands torch's generator over where sample_matvec has a second argument without a default."""
    try:
        given = inspect.signature(sample_matvec).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return sample_matvec
    if sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given) < 2:
        return sample_matvec
    return lambda u: sample_matvec(u, torch.default_generator)


def _operator(matvec, v, damping):
    if not (isinstance(v, torch.Tensor) and v.dim() in (1, 2) and v.numel() and v.is_floating_point()
            and v.isfinite().all()):
        raise ValueError(f"v: got {getattr(v, 'shape', type(v).__name__)}; give finite floating vectors, [P] or [P, k]")
    if not damping >= 0:
        raise ValueError(f"damping must be a number of at least 0, got {damping}")
    product = _checked(matvec, v, "matvec")
    return lambda u: product(u) + damping * u


def _checked(function, v, argument):
    """`function`, whose results must have v's shape, dtype and device are made v's, and NaNs are refused."""
    def call(u):
        out = function(u)
        if not isinstance(out, torch.Tensor) or out.shape != u.shape:
            raise ValueError(f"{argument}: gave {getattr(out, 'shape', type(out).__name__)} for a vector of shape "
                             f"{tuple(u.shape)}; it must keep the shape")
        if not bool(out.isfinite().all()) and bool(u.isfinite().all()):
            raise ValueError(f"{argument}: gave NaN or infinity for a finite vector of norm {float(u.norm()):.2g}")
        return out.detach().to(v)

    return call


def _solution(A, v, x):
    miss = torch.stack([A(column) for column in x.T], 1) - v.reshape(x.shape)
    relative = miss.norm(dim=0) / v.reshape(x.shape).norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
    return Solution(x.reshape(v.shape), relative.max()[None].double())


def _at_least_one(name, value):
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


def _up(value):
    return f"{1.1 * value:.2g}"  # two digits never round it below the value itself
