"""cg, lissa, arnoldi and nystrom against dense solves in float64: identities, error cases, negative controls."""

import re

import pytest
import torch

import helpers
from helpers import Solution, arnoldi, cg, classification, ggn, hessian, hvp, lissa, nystrom

P, DAMPING = 12, 0.1


def symmetric(eigenvalues, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=g))[0]
    return Q * values @ Q.T


def vectors(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(H, v, damping=DAMPING):
    return torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), v)


def product(H):
    return lambda u: H @ u


def close(x, y, rtol=1e-10):
    return float((x - y).norm()) <= rtol * float(y.norm())


POSITIVE = symmetric(torch.linspace(0.02, 3.0, P))
SINGULAR = symmetric([3.0, 2.0, 1.5, 1.0] + [0.0] * (P - 4))
INDEFINITE = symmetric([3.0, 2.0, 1.5, -0.7] + [0.5] * (P - 4))
SOLVERS = {
    "cg": lambda A, v, damping: cg(A, v, damping),
    "lissa": lambda A, v, damping: lissa(A, v, damping, scale=3.0, depth=800),
    "arnoldi": lambda A, v, damping: arnoldi(A, v, damping),
    "nystrom": lambda A, v, damping: nystrom(A, v, damping),
}


def number(error, name):
    return float(re.findall(rf"{name}=([\d.e+-]+\d)", str(error.value))[-1])


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("shape", [(P,), (P, 3)])
@pytest.mark.parametrize("H", [POSITIVE, SINGULAR], ids=["positive", "rank 4"])
@pytest.mark.parametrize("name", SOLVERS)
def test_equals_the_dense_solve(name, H, shape):
    v = vectors(*shape)
    solution = SOLVERS[name](product(H), v, DAMPING)
    assert isinstance(solution, Solution) and solution.x.shape == v.shape and solution.x.dtype == v.dtype
    assert close(solution.x, dense(H, v)), name
    assert not close(solution.x, dense(H, v, 1.1 * DAMPING), 1e-3), "negative control: another damping"
    assert solution.residuals.dtype == torch.float64 and float(solution.residuals.flatten()[-1]) <= 1e-9


def test_cg_needs_p_steps_and_no_more():
    v = vectors(P)
    solution = cg(product(POSITIVE), v, DAMPING, max_steps=P)
    assert close(solution.x, dense(POSITIVE, v))
    assert len(solution.residuals) <= P + 1 and solution.residuals[0] == 1.0
    few = cg(product(SINGULAR), v, DAMPING)  # five different eigenvalues
    assert len(few.residuals) == 6 and close(few.x, dense(SINGULAR, v))


def test_cg_residuals_are_the_true_ones():
    v = vectors(P)
    A = POSITIVE + DAMPING * torch.eye(P, dtype=torch.float64)
    residuals = cg(product(POSITIVE), v, DAMPING).residuals
    with pytest.raises(ValueError, match=f"residual of {residuals[4]:.2g}, not"):
        cg(product(POSITIVE), v, DAMPING, max_steps=4)
    K = torch.stack([torch.linalg.matrix_power(A, j) @ v for j in range(4)], 1)  # x_4 minimises the error in this space
    x = K @ torch.linalg.solve(K.T @ A @ K, K.T @ v)
    assert residuals[4] == pytest.approx(float((v - A @ x).norm() / v.norm()), rel=1e-6)


def test_a_preconditioner_changes_the_steps_and_not_the_answer():
    H, v = symmetric(torch.logspace(-3, 3, 40)), vectors(40)
    nearly = torch.linalg.inv(symmetric(torch.logspace(-3, 3, 40) * torch.linspace(0.9, 1.1, 40)))
    plain, helped = cg(product(H), v, tolerance=1e-8), cg(product(H), v, tolerance=1e-8, preconditioner=product(nearly))
    assert close(helped.x, dense(H, v, 0.0), 1e-6) and len(helped.residuals) < len(plain.residuals) / 3


def test_lissa_is_the_neumann_series():
    v, scale, depth = vectors(P), 2.0, 7
    M = torch.eye(P, dtype=torch.float64) * (1 - DAMPING / scale) - POSITIVE / scale
    series = sum(torch.linalg.matrix_power(M, j) @ v for j in range(depth + 1))
    solution = lissa(product(POSITIVE), v, DAMPING, scale, depth)
    assert close(solution.x, series / scale)
    last, before = series, series - torch.linalg.matrix_power(M, depth) @ v
    assert float(solution.residuals[0, -1]) == pytest.approx(float((last - before).norm() / last.norm()), rel=1e-10)
    assert not close(solution.x, series), "negative control: the answer is h / scale, not h"


def test_arnoldi_with_a_rank_keeps_the_largest_pairs():
    v = vectors(P)
    values, U = torch.linalg.eigh(POSITIVE)
    top = U[:, -3:]
    expected = top @ ((top.T @ v) / (values[-3:] + DAMPING))
    solution = arnoldi(product(POSITIVE), v, DAMPING, rank=3)
    assert close(solution.x, expected)
    assert float(solution.residuals) == pytest.approx(float((v - top @ (top.T @ v)).norm() / v.norm()))
    indefinite = arnoldi(product(INDEFINITE), v, 1.0)  # positive with this damping
    assert close(indefinite.x, dense(INDEFINITE, v, 1.0))


def test_arnoldi_goes_on_where_the_krylov_space_closes():
    v = vectors(P)
    assert close(arnoldi(lambda u: 2 * u, v, 0.5).x, v / 2.5)


def test_nystrom_is_exact_beyond_the_rank_of_h_and_close_for_decaying_spectra():
    v = vectors(60)
    low = symmetric([5.0, 3.0, 1.0] + [0.0] * 57)
    assert close(nystrom(product(low), v, DAMPING, rank=6).x, dense(low, v))
    decaying = symmetric(0.5 ** torch.arange(60.0))
    solved = [nystrom(product(decaying), v, 0.01, rank=r).x for r in (5, 10, 20)]
    errors = [float((x - dense(decaying, v, 0.01)).norm()) for x in solved]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_float32_stays_float32():
    v = vectors(P).float()
    for name, solve in SOLVERS.items():
        x = solve(lambda u: POSITIVE.float() @ u, v, DAMPING).x
        assert x.dtype == torch.float32 and close(x.double(), dense(POSITIVE, v.double()), 1e-4), name


def test_all_of_them_take_hvp_of_a_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    batch = {"input": vectors(9, 3), "labels": torch.arange(9) % 2}
    H, v = hessian(model, batch, classification), vectors(8)
    for name, solve in SOLVERS.items():
        if name == "lissa":  # the same contract as cg, and a thousand products
            continue
        x = solve(lambda u: hvp(model, batch, u, classification), v, DAMPING).x
        assert not x.requires_grad and close(x, dense(H, v)), name
    assert close(ggn(model, batch, classification), H)


# ---------------------------------------------------------------- sampling


EXAMPLES = torch.stack([symmetric([2.0 * w, w, 0.2], seed=s) for s, w in enumerate([0.2, 0.5, 1.0, 4.0])])


def draw(u, generator):
    return EXAMPLES[torch.randint(len(EXAMPLES), (1,), generator=generator)[0]] @ u


def test_lissa_with_batches_goes_to_the_answer_of_the_mean():
    v = vectors(3)
    solution = lissa(draw, v, DAMPING, scale=8.0, depth=400, repeats=60)
    truth = dense(EXAMPLES.mean(0), v)
    spread = torch.stack([lissa(draw, v, DAMPING, scale=8.0, depth=400, seed=s).x for s in range(60)])
    assert close(solution.x, spread.mean(0)), "repeat t is the run with seed + t"
    assert ((solution.x - truth).abs() < 4 * spread.std(0) / 60**0.5).all()
    assert solution.residuals.shape == (60, 400)


def test_the_noise_floor_falls_with_repeats_and_scale_and_not_with_depth():
    v = vectors(3)
    truth = dense(EXAMPLES.mean(0), v)

    def floor(scale, depth, repeats):  # root mean square error of an average of `repeats` runs, over 8 such
        errors = [lissa(draw, v, DAMPING, scale, depth, repeats, seed=1000 * s).x - truth for s in range(8)]
        return float(torch.stack(errors).norm() / truth.norm() / 8**0.5)

    base = floor(8.0, 400, 1)
    assert 0.7 < floor(8.0, 800, 1) / base < 1.4, "more steps leave the floor where it is"
    assert 0.15 < floor(8.0, 400, 16) / base < 0.4, "16 runs: a quarter"
    assert floor(32.0, 1600, 1) < 0.75 * base, "a larger scale, with as many more steps, lowers it"
    A = EXAMPLES.mean(0) + DAMPING * torch.eye(3, dtype=v.dtype)
    series = truth - torch.linalg.matrix_power(torch.eye(3, dtype=v.dtype) - A / 8.0, 21) @ truth
    runs = torch.stack([lissa(draw, v, DAMPING, 8.0, 20, 30, seed=1000 * s).x for s in range(12)])
    assert ((runs.mean(0) - series).abs() < 4 * runs.std(0) / 12**0.5).all(), "the mean is the full-batch series"
    assert not ((runs.mean(0) - truth).abs() < 4 * runs.std(0) / 12**0.5).all(), "and not to the answer: that is bias"


def test_the_seed_decides_the_draws_and_torchs_generator_is_put_back():
    v = vectors(3)
    one_argument = lambda u: EXAMPLES[torch.randint(len(EXAMPLES), ())] @ u
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    runs = [lissa(f, v, DAMPING, 8.0, 50, 2, seed=s).x for f in (draw, one_argument) for s in (0, 1)]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(runs[0], lissa(draw, v, DAMPING, 8.0, 50, 2, seed=0).x)
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1]) and not torch.equal(runs[2], runs[3])


def test_an_argument_with_a_default_is_not_the_generator():
    v = vectors(P)
    assert close(lissa(lambda u, H=POSITIVE: H @ u, v, DAMPING, 3.0, 800).x, dense(POSITIVE, v))
    assert close(lissa(POSITIVE.mv, v, DAMPING, 3.0, 800).x, dense(POSITIVE, v))


# ---------------------------------------------------------------- errors


def test_lissa_names_a_scale_that_works():
    v = vectors(P)
    with pytest.raises(ValueError, match="LiSSA diverged") as error:
        lissa(product(POSITIVE), v, DAMPING, scale=1.0, depth=400)  # norm 3.1 > 2 × 1
    named = number(error, "scale")
    assert 3.1 <= named < 7
    assert close(lissa(product(POSITIVE), v, DAMPING, named, 2000).x, dense(POSITIVE, v))
    lissa(product(POSITIVE), v, DAMPING, scale=1.6, depth=400)  # just above 3.1 / 2


def test_lissa_of_single_examples_names_the_scale_of_the_largest():
    H, v = EXAMPLES.mean(0), vectors(3)
    scale = 0.51 * (float(torch.linalg.eigvalsh(H)[-1]) + DAMPING)
    lissa(product(H), v, DAMPING, scale, depth=500)  # safe for the full batch
    with pytest.raises(ValueError, match="LiSSA diverged") as error:
        lissa(draw, v, DAMPING, scale, depth=500)
    named = number(error, "scale")
    assert named >= 8.0  # the largest eigenvalue of the largest example
    lissa(draw, v, DAMPING, named, depth=500)


@pytest.mark.parametrize("depth", [20, 50])
def test_lissa_does_not_take_a_noise_floor_for_divergence(depth):
    """At depths that split into few steps, one run on single examples: its steps are as large late as at the end."""
    for seed in range(40):
        lissa(draw, vectors(3), DAMPING, 8.0, depth, seed=seed)


@pytest.mark.parametrize("scale, depth", [(3.0, 300), (40.0, 500)], ids=["runs away", "grows slowly"])
def test_lissa_names_a_damping_where_h_is_indefinite(scale, depth):
    v = vectors(P)
    with pytest.raises(ValueError, match="no scale helps") as error:
        lissa(product(INDEFINITE), v, 0.01, scale, depth)
    named = number(error, "damping")
    assert 0.7 < named < 1.2
    assert close(lissa(product(INDEFINITE), v, named, 5.0, 1000).x, dense(INDEFINITE, v, named), 1e-8)


@pytest.mark.parametrize("H, kind", [(SINGULAR, "singular"), (INDEFINITE, "indefinite")])
@pytest.mark.parametrize("name", ["cg", "arnoldi"])
def test_negative_and_zero_curvature_name_a_damping_that_works(name, H, kind):
    v = vectors(P)
    with pytest.raises(ValueError, match=kind) as error:
        SOLVERS[name](product(H), v, 0.0)
    named = number(error, "damping")
    assert named < 1.3 and close(SOLVERS[name](product(H), v, named).x, dense(H, v, named))


def test_cg_solves_a_singular_system_that_has_a_solution():
    v = SINGULAR @ vectors(P)
    assert close(SINGULAR @ cg(product(SINGULAR), v).x, v)


def test_cg_sees_negative_curvature_in_one_column_of_many():
    v = torch.stack([torch.linalg.eigh(INDEFINITE)[1][:, k] for k in (-1, 0)], 1)
    assert close(cg(product(INDEFINITE), v[:, :1]).x, dense(INDEFINITE, v[:, :1], 0.0))
    with pytest.raises(ValueError, match="indefinite"):
        cg(product(INDEFINITE), v)


def test_nystrom_refuses_an_indefinite_h_and_no_damping():
    with pytest.raises(ValueError, match="indefinite, its curvature falls to -0.7.*Gauss-Newton.*c = 0.77 or more"):
        nystrom(product(INDEFINITE), vectors(P), 1.0)
    with pytest.raises(ValueError, match="damping=0"):
        nystrom(product(POSITIVE), vectors(P), 0.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_arguments(name):
    solve = SOLVERS[name]
    with pytest.raises(ValueError, match=r"v: got torch.Size\(\[2, 3, 4\]\)"):
        solve(product(POSITIVE), vectors(2, 3, 4), DAMPING)
    with pytest.raises(ValueError, match="v: got list"):
        solve(product(POSITIVE), [1.0] * P, DAMPING)
    with pytest.raises(ValueError, match=r"matvec: gave torch.Size\(\[11\]\) for a vector of shape \(12,\)"):
        solve(lambda u: u[:-1], vectors(P), DAMPING)
    with pytest.raises(ValueError, match="matvec: gave NaN"):
        solve(lambda u: u / 0 * 0, vectors(P), DAMPING)
    with pytest.raises(ValueError, match="damping(=-0.1: Nyström takes H| must be a number of at least 0, got -0.1)"):
        solve(product(POSITIVE), vectors(P), -0.1)


def test_bad_sizes():
    with pytest.raises(ValueError, match="scale=0"):
        lissa(product(POSITIVE), vectors(P), scale=0)
    with pytest.raises(ValueError, match="rank=0"):
        nystrom(product(POSITIVE), vectors(P), 0.1, rank=0)
    with pytest.raises(ValueError, match="steps=0"):
        arnoldi(product(POSITIVE), vectors(P), 0.1, steps=0)
    with pytest.raises(ValueError, match=r"preconditioner: gave torch.Size\(\[3\]\)"):
        cg(product(POSITIVE), vectors(P), preconditioner=lambda r: r[:3])


def test_zero_has_the_answer_zero():
    for solve in SOLVERS.values():
        assert not solve(product(POSITIVE), torch.zeros(P, dtype=torch.float64), DAMPING).x.any()


def test_exported():
    assert {"Solution", "arnoldi", "cg", "lissa", "nystrom"} <= set(helpers.__all__)
