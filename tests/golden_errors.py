"""How far an array is from its golden one, over its bound: at most 1 passes."""

from typing import Any

import numpy as np

Golden = dict[str, np.ndarray]
Errors = dict[str, float]
"""Error over bound, by array."""


def relative(got: Any, want: np.ndarray, bound: float) -> float:
    """Largest absolute difference over the largest golden magnitude, over the bound."""
    got = np.asarray(got)
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max() / bound)


def absolute(got: Any, want: np.ndarray, bound: float) -> float:
    got = np.asarray(got)
    return float(np.abs(got - want).max() / bound) if got.shape == want.shape else float("inf")


def of_change(got: Any, want: np.ndarray, start: np.ndarray, bound: float) -> float:
    """Largest difference over the largest golden change from the start; no change means none."""
    got = np.asarray(got)
    change = np.abs(want - start).max()
    difference = np.abs(got - want).max()
    if change == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / change / bound)


def exact(got: Any, want: Any) -> float:
    return 0.0 if np.array_equal(np.asarray(got), np.asarray(want)) else float("inf")
