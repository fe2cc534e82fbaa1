"""Sizes that a fast run may shrink, and checks that print one line or raise."""

import os
from collections.abc import Mapping

import numpy as np
import torch


def pick(full, fast):
    """`full`, or `fast` where the environment has FAST=1 (`make test` sets it). For the Settings cell only.

    Raises ValueError for any other value of FAST than 1, 0 or nothing.
    """
    mode = os.environ.get("FAST", "")
    if mode not in ("", "0", "1"):
        raise ValueError(f"FAST={mode!r} is not understood; set FAST=1 for fast sizes, FAST=0 or nothing for full ones")
    return fast if mode == "1" else full


def check_close(what, x, y, rtol=1e-6, atol=0.0):
    """Print one line if x agrees with the reference y, raise AssertionError with the numbers if not.

    The relative difference is the larger of ‖x − y‖ / ‖y‖ in two norms, the Euclidean one and the maximum. The first
    sees many small errors, the second a single large one; neither is upset by entries of y that are zero by chance.
    x agrees if this is at most rtol, or if max |x − y| is at most atol (say so where y is zero).

    x, y: tensors, arrays or numbers of the same shape, or dicts of them with the same keys (the worst key counts).
    Raises AssertionError also for different shapes or keys, empty input, NaN and infinities.
    """
    worst = 0.0
    for at, (a, b) in _pairs(what, x, y):
        relative, largest = _difference(what + at, a, b)
        if relative > rtol and largest > atol:
            index = np.unravel_index(np.abs(a - b).argmax(), a.shape)
            raise AssertionError(
                f"✗ {what}{at}: max relative difference {relative:.1e} (rtol {rtol:.0e}, atol {atol:.0e}); "
                f"furthest apart at {tuple(map(int, index))} of {a.shape}: {a[index]:.9g} against {b[index]:.9g}"
            )
        worst = max(worst, relative)
    print(f"✓ {what}: max relative difference {worst:.1e} (rtol {rtol:.0e}{f', atol {atol:.0e}' if atol else ''})")


def _pairs(what, x, y):
    """[(suffix for the name, (x, y) as float64 arrays)]: one pair, or one a key of two dicts."""
    if not isinstance(x, Mapping) and not isinstance(y, Mapping):
        return [("", (_array(x), _array(y)))]
    if not (isinstance(x, Mapping) and isinstance(y, Mapping)) or x.keys() != y.keys() or not x:
        keys = [sorted(map(str, z)) if isinstance(z, Mapping) else type(z).__name__ for z in (x, y)]
        raise AssertionError(f"✗ {what}: nothing to compare, or the keys differ: {keys[0]} against {keys[1]}")
    return [(f"[{key!r}]", (_array(x[key]), _array(y[key]))) for key in x]


def _array(x):
    return np.asarray(x.detach().cpu().double() if isinstance(x, torch.Tensor) else x, dtype=np.float64)


def _difference(name, a, b):
    """(relative difference, max |a − b|) of two arrays that can be compared; AssertionError if they cannot."""
    if a.shape != b.shape or a.size == 0:
        raise AssertionError(f"✗ {name}: cannot compare shapes {a.shape} and {b.shape}; they must be equal, not empty")
    for side, values in (("x", a), ("y", b)):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise AssertionError(f"✗ {name}: {bad} of {values.size} entries of {side} are NaN or infinite")
    gap, size = (a - b).ravel(), b.ravel()
    largest = np.abs(gap).max()
    if largest == 0:
        return 0.0, 0.0
    with np.errstate(divide="ignore"):
        return max(np.linalg.norm(gap) / np.linalg.norm(size), largest / np.abs(size).max()), largest
