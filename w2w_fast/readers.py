"""Linear readers of attributes in coefficients, and how well they read people left out.

Every figure comes with its null: the mean, and the 95% quantile, of the same figure for labels that
were dealt out to the wrong people, read in the same way, choice of strength included. A figure
below that quantile says nothing. The principal components themselves saw everybody, never a label.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .linear import ridge

METHODS = ("ridge", "lstsq", "logistic")
PERMUTATIONS = 20
_FOLDS = 5


def check_labels(labels: Tensor, attributes: Sequence[str], n: int) -> None:
    """InputError unless labels are ``[n, a]``, finite, of two values or more; names distinct."""
    if labels.shape != (n, len(attributes)) or len(set(attributes)) != len(attributes):
        raise InputError(
            f"labels: wanted [{n}, {len(attributes)}] and distinct attributes, "
            f"got {list(labels.shape)} and {list(attributes)}"
        )
    for name, column in zip(attributes, labels.mT, strict=True):
        if not bool(column.isfinite().all()) or len(column.unique()) < 2:
            raise InputError(f"labels: {name}: wanted finite numbers of two or more values")


def fit_readers(
    c: Tensor,
    labels: Tensor,
    attributes: Sequence[str],
    *,
    method: str = "ridge",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """(weights ``[a, m]`` float32, a report an attribute) of c ``[n, m]`` and labels ``[n, a]``.

    ridge: closed form, the strength chosen left one out, an attribute at a time; lstsq, the
    paper's, the same without a penalty; logistic: scikit-learn's, for attributes of two values (the
    others get ridge), penalty chosen and read in five folds. The report has ``method``, ``r2`` and
    ``ridge`` (the strength), of two values ``accuracy``, ``balanced_accuracy`` and ``auc``, of more
    ``spearman``, and ``null``: figure -> [mean, 95% quantile] over ``permutations`` of the people.
    Accuracies decide midway between the two classes' mean scores. InputError for bad labels.
    """
    if method not in METHODS:
        raise InputError(f"method: wanted ridge, lstsq or logistic, got {method!r}")
    check_labels(labels, attributes, len(c))
    n, a = labels.shape
    if 3 * c.shape[1] > n:
        warnings.warn(
            f"{c.shape[1]} components for {n} labelled models: readers are at their worst "
            "where the two are close; keep m below a third of n",
            stacklevel=3,
        )
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(permutations)]
    c, labels = c.cpu(), labels.cpu()
    zero = torch.zeros(1, dtype=torch.float64)
    everybody = torch.cat([labels, *(labels[order] for order in orders)], dim=1)
    found = ridge(c, everybody, zero if method == "lstsq" else None)
    # Without the left-out intercept, which is higher for whoever is lower: see Airola et al., 2011.
    total = everybody.double().sum(0)
    scores = found.predictions - (total - everybody) / (n - 1)
    weights, report = found.weights[:a].float(), {}
    for i, name in enumerate(attributes):
        binary = len(labels[:, i].unique()) == 2
        truths, mine = everybody[:, i::a], scores[:, i::a]
        entry: dict[str, Any] = {"method": method, "r2": float(found.r2[i])}
        if method == "logistic" and binary:
            weights[i], mine = _logistic(c, truths, name, seed)
        else:
            entry |= {"method": "lstsq" if method == "lstsq" else "ridge"}
            entry |= {"ridge": float(found.strength[i])}
        figures = [_figures(t, s, binary) for t, s in zip(truths.mT, mine.mT, strict=True)]
        if not binary:
            for figure, r2 in zip(figures, found.r2[i::a].tolist(), strict=True):
                figure["r2"] = r2
        entry |= figures[0]
        if orders:
            entry["null"] = {key: _null([f[key] for f in figures[1:]]) for key in figures[0]}
        report[name] = entry
    return weights, report


def readings(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(attribute, its figures in a line) of what ``fit_readers`` reported, as a file has it."""
    texts = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "r2": "R2",
             "spearman": "Spearman"}  # fmt: skip
    for name, entry in report.items():
        entry = entry if isinstance(entry, Mapping) else {}
        null = entry.get("null") if isinstance(entry.get("null"), Mapping) else {}
        shown = [key for key in texts if key in null] or ["accuracy", "r2"]
        parts = []
        for key in shown:
            if not isinstance(entry.get(key), float):
                continue
            text = f"{texts.get(key, key)} {entry[key]:.3f}"
            chance = null.get(key)
            if isinstance(chance, list) and [type(x) for x in chance] == [float, float]:
                text += f" (by chance {chance[0]:.3f}, 95% below {chance[1]:.3f})"
            parts.append(text)
        yield str(name), ", ".join(parts) or "nothing known"


def _figures(truth: Tensor, score: Tensor, binary: bool) -> dict[str, float]:
    """How well scores ``[n]`` of people left out tell the truth ``[n]``."""
    if not binary:
        from scipy.stats import spearmanr

        return {"spearman": float(spearmanr(truth.numpy(), score.numpy()).statistic)}
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    high = truth == truth.max()
    middle = (score[high].mean() + score[~high].mean()) / 2
    said = score > middle
    return {
        "accuracy": float((said == high).double().mean()),
        "balanced_accuracy": float(balanced_accuracy_score(high.numpy(), said.numpy())),
        "auc": float(roc_auc_score(high.numpy(), score.numpy())),
    }


def _null(values: list[float]) -> list[float]:
    found = torch.tensor(values, dtype=torch.float64)
    return [float(found.mean()), float(found.quantile(0.95))]


def _logistic(c: Tensor, truths: Tensor, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """(weights ``[m]``, scores left out ``[n, p]``) of p labels ``[n, p]``, the first the real one.

    The penalty is chosen by the real one's left-out likelihood, and serves the permuted ones.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    high = (truths == truths.max()).numpy()
    rarest = min(int(high[:, 0].sum()), int((~high[:, 0]).sum()))
    if rarest < 2:
        raise InputError(f"labels: {name}: logistic wants two people of each kind, got {rarest}")
    scale = float(c.double().var(0, correction=0).mean().sqrt())
    x = ((c - c.mean(0)) / scale).double().numpy()
    folds = StratifiedKFold(min(_FOLDS, rarest), shuffle=True, random_state=seed)

    def left_out(penalty: float, y: Any) -> Any:
        model = LogisticRegression(C=penalty, max_iter=1000)
        return cross_val_predict(model, x, y, cv=folds, method="decision_function")

    tried = {}
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        odds = left_out(penalty, high[:, 0])
        tried[penalty] = log_loss(high[:, 0], torch.tensor(odds).sigmoid().numpy())
    best = min(tried, key=tried.__getitem__)
    scores = np.stack([left_out(best, y) for y in high.T], axis=1)
    model = LogisticRegression(C=best, max_iter=1000).fit(x, high[:, 0])
    weights = torch.from_numpy(model.coef_[0] / scale).float()
    return weights, torch.from_numpy(scores)
