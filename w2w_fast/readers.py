"""Linear readers of attributes in coefficients, and how well they read people left out.

Every figure comes with its null: the mean, and the 95% quantile, of the same figure for labels that
were dealt out to the wrong people, read in the same way, choice of strength included. A figure
below that quantile says nothing. The principal components themselves saw everybody, never a label.

A score becomes a reading by what scores of people left out meant (``calibration``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .linear import Reader, ridge

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
    origin: Tensor | None = None,
) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """(weights ``[a, m]`` float32, a report an attribute) of c ``[n, m]`` and labels ``[n, a]``.

    ridge: closed form, the strength chosen left one out, an attribute at a time; lstsq, the
    paper's, the same without a penalty; logistic: scikit-learn's, for attributes of two values (the
    others get ridge), penalty chosen and read in five folds. The report has ``method``, ``r2`` and
    ``ridge`` (the strength), of two values ``accuracy``, ``balanced_accuracy`` and ``auc``, of more
    ``spearman``, ``null``: figure -> [mean, 95% quantile] over ``permutations`` of the people, and
    ``calibration`` (see there). Accuracies decide midway between the two classes' mean scores.
    Scores count from ``origin`` [m], the mean of c by default. InputError for bad labels.
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
    scores = _without_intercept(found, everybody)
    middle = c.double().mean(0) - (c.mean(0) if origin is None else origin.cpu()).double()
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
        entry["calibration"] = calibration(mine[:, 0] + middle @ weights[i].double(), truths[:, 0])
        if orders:
            entry["null"] = {key: _null([f[key] for f in figures[1:]]) for key in figures[0]}
        report[name] = entry
    return weights, report


def calibration(scores: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """What scores ``[n]`` of people left out say of labels ``[n]``, and the other way round.

    ``values``: the least and the greatest label. ``label``: [i, s], a person of score x has the
    label i + s x, give or take ``sd``; for labels of two values (sd empty) these are log odds of
    the greater (Platt, Probabilistic Outputs for Support Vector Machines, 1999: his targets keep
    them finite where the two never mix). ``score``: [i, s], the score of people of label y is
    i + s y on average.
    A slope that would be negative is 0: such a reader knows nothing.
    """
    x, y = scores.double(), truth.double()
    low, high = float(y.min()), float(y.max())
    back = max(0.0, float(_slope(y, x)))
    found = {"values": [low, high], "score": [float(x.mean() - back * y.mean()), back]}
    if len(truth.unique()) == 2:
        return found | {"label": _log_odds(x, y == high), "sd": []}
    slope = max(0.0, float(_slope(x, y)))
    start = float(y.mean() - slope * x.mean())
    rest = (y - start - slope * x).square().sum() / max(1, len(y) - 2)
    return found | {"label": [start, slope], "sd": [float(rest.sqrt())]}


def calibrations(
    c: Tensor, labels: Tensor, attributes: Sequence[str], report: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """``calibration`` of each attribute from c ``[n, m]`` and labels ``[n, a]``.

    For a report that has none: ridge readers of the strengths it tells. Logistic ones are left out.
    """
    found, at = {}, {}
    for i, name in enumerate(attributes):
        entry = report.get(name) if isinstance(report.get(name), Mapping) else {}
        strength = entry.get("ridge")
        if isinstance(strength, (int, float)) and entry.get("method") != "logistic":
            at.setdefault(float(strength), []).append(i)
    for strength, columns in at.items():
        mine = labels[:, columns].cpu()
        one = torch.tensor([strength], dtype=torch.float64)
        scores = _without_intercept(ridge(c.cpu(), mine, one), mine)
        for i, score, truth in zip(columns, scores.mT, mine.mT, strict=True):
            found[attributes[i]] = calibration(score, truth)
    return found


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


def _without_intercept(found: Reader, labels: Tensor) -> Tensor:
    """Left-out scores ``[n, a]``, counted from the mean label of those who were not left out.

    With that intercept they would be higher for whoever is lower: see Airola et al., 2011.
    """
    return found.predictions - (labels.double().sum(0) - labels) / (len(labels) - 1)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Of the least squares line of y on x."""
    x = x - x.mean()
    return (x @ y) / x.square().sum().clamp_min(1e-300)


def _log_odds(x: Tensor, high: Tensor) -> list[float]:
    """[i, s] of Platt's sigmoid: log odds i + s x of ``high``, s >= 0."""
    from sklearn.linear_model import LogisticRegression

    ones, n = int(high.sum()), len(high)
    target = torch.where(high, (ones + 1) / (ones + 2), 1 / (n - ones + 2)).double()
    scale = float(x.std().clamp_min(1e-300))
    z = ((x - x.mean()) / scale)[:, None].numpy()
    # A target of .9 is nine tenths of a person with the label and one tenth of one without.
    y, share = np.repeat([1, 0], n), torch.cat([target, 1 - target]).numpy()
    model = LogisticRegression(C=1e6).fit(np.concatenate([z, z]), y, sample_weight=share)
    slope = max(0.0, float(model.coef_[0, 0]))
    start = float(model.intercept_[0]) if slope else math.log((ones + 1) / (n - ones + 1))
    return [start - slope * float(x.mean()) / scale, slope / scale]


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
    # Without the intercept: a score counts from the mean of c.
    return weights, torch.from_numpy(scores) - float(model.intercept_[0])
