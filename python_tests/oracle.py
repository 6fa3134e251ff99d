"""The maths of weight spaces in float64 numpy, written from the formulas, not from the package."""

from __future__ import annotations

from typing import Any

import numpy as np


def f64(value: Any) -> np.ndarray:
    """Any array or tensor, bfloat16 too, as float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def reconstruct(c: Any, basis: Any, mean: Any, std: Any) -> np.ndarray:
    """w = mean + std * (c V^T)"""
    c, basis, mean, std = map(f64, (c, basis, mean, std))
    return mean + std * np.einsum("km,dm->kd", c, basis)


def reconstruct_grad(g: Any, basis: Any, std: Any) -> np.ndarray:
    """dL/dc = (std * dL/dw) V"""
    g, basis, std = map(f64, (g, basis, std))
    return np.einsum("kd,d,dm->km", g, std, basis)


def project(w: Any, basis: Any, mean: Any, std: Any) -> np.ndarray:
    """c = ((w - mean) / std) V, coordinates of std 0 left out"""
    w, basis, mean, std = map(f64, (w, basis, mean, std))
    moves = std != 0
    return ((w - mean)[:, moves] / std[moves]) @ basis[moves]


def low_rank(x: Any, A: Any, B: Any, scale: Any) -> np.ndarray:
    """scale * (x A^T) B^T, row i with its own A, B and scale (one of each: everyone's)"""
    x, A, B = map(f64, (x, A, B))
    scales = np.broadcast_to(f64(scale), len(x))
    rows = [scales[i] * x[i] @ A[i % len(A)].T @ B[i % len(B)].T for i in range(len(x))]
    return np.stack(rows) if rows else np.zeros((0, x.shape[1], B.shape[1]))


def low_rank_gradients(g: Any, x: Any, A: Any, B: Any, index: Any, scale: Any) -> tuple:
    """(dx, dA, dB, the term itself) for a gradient g of the term, a sample at a time

    An adapter by index; without it a sample's own, or the one there is.
    """
    g, x, A, B = map(f64, (g, x, A, B))
    scale = np.broadcast_to(f64(scale), len(x))
    dx, dA, dB, y = np.zeros_like(x), np.zeros_like(A), np.zeros_like(B), np.zeros_like(g)
    for i in range(len(x)):
        a = (i if len(A) > 1 else 0) if index is None else int(index[i])
        u, s = g[i] @ B[a], x[i] @ A[a].T
        dx[i], y[i] = scale[i] * u @ A[a], scale[i] * s @ B[a].T
        dA[a] += scale[i] * u.T @ x[i]
        dB[a] += scale[i] * g[i].T @ s
    return dx, dA, dB, y


def adapted_linear(x: Any, weight: Any, bias: Any, A: Any, B: Any, scale: Any) -> np.ndarray:
    """y = x W^T + bias + low_rank"""
    y = f64(x) @ f64(weight).T + low_rank(x, A, B, scale)
    return y if bias is None else y + f64(bias)


def merge(weight: Any, A: Any, B: Any, scale: float) -> np.ndarray:
    """W' = W + scale * B A"""
    return f64(weight) + scale * f64(B) @ f64(A)


def edit(c: Any, direction: Any, amount: Any) -> np.ndarray:
    """c' = c + amount * direction, one amount a row"""
    c, direction = f64(c), f64(direction)
    return c + np.broadcast_to(f64(amount), len(c))[:, None] * direction


def pca(w: Any, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mean, std, |V|-ordered basis with positive largest entries, explained) by SVD"""
    w = f64(w)
    mean, std = w.mean(0), w.std(0)
    z = np.divide(w - mean, std, out=np.zeros_like(w), where=std > 1e-7 * np.abs(mean))
    _, s, vt = np.linalg.svd(z, full_matrices=False)
    basis = vt[:m].T
    signs = np.sign(basis[np.abs(basis).argmax(0), np.arange(m)])
    return mean, std, basis * signs, (s**2 / (s**2).sum())[:m]


def ridge_left_out(c: Any, y: Any, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """(weights, predictions of each row by a model fitted without it), one column y, by brute force

    The penalty is the same for every fit; the intercept is free.
    """
    c, y = f64(c), f64(y)

    def fit(c: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
        z = c - c.mean(0)
        weights = np.linalg.solve(z.T @ z + strength * np.eye(c.shape[1]), z.T @ (y - y.mean()))
        return weights, y.mean() - c.mean(0) @ weights

    predictions = []
    for i in range(len(c)):
        rest = np.arange(len(c)) != i
        weights, intercept = fit(c[rest], y[rest])
        predictions.append(c[i] @ weights + intercept)
    return fit(c, y)[0], np.array(predictions)
