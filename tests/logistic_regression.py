"""The accuracy of a linear classifier on raw values: a yardstick for how much of a data set needs a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from experiments.data.dataset import Dataset

L2_STRENGTHS = (1e-3, 1e-4, 1e-5)


def pixel_accuracy(dataset: Dataset, l2_strengths: Sequence[float] = L2_STRENGTHS) -> float:
    """Test accuracy of multinomial logistic regression on the raw pixels of a Dataset."""
    train, test = dataset.train, dataset.test
    return logistic_regression_accuracy(train.images, train.labels, test.images, test.labels, l2_strengths)


def logistic_regression_accuracy(
    train_x: np.ndarray,
    train_labels: np.ndarray,
    test_x: np.ndarray,
    test_labels: np.ndarray,
    l2_strengths: Sequence[float] = L2_STRENGTHS,
) -> float:
    """The best test accuracy over the strengths, each fit to convergence: an upper bound, since the test set selects.

    Minimizes mean cross-entropy + strength/2 · D·|W|² on D features standardized by the training set. At the
    optimum W is a combination of the training examples, so the search stays in the space that they span, whatever the
    number of pixels. In their principal axes XᵀX is diagonal, and a rescaling makes the problem well conditioned.

    Args:
      train_x, test_x: (N, …) numbers; all but the first axis are features.
      train_labels, test_labels: (N,) class numbers from 0.
      l2_strengths: tried from the largest to the smallest; each fit starts from the previous solution.

    Returns:
      The share of test examples classified correctly, in [0, 1].
    """
    train_x, test_x = (x.reshape(len(x), -1).astype(np.float64) for x in (train_x, test_x))
    mean, std = train_x.mean(0), train_x.std(0)
    train_x, test_x = ((x - mean) / np.maximum(std, 1e-9) / np.sqrt(x.shape[1]) for x in (train_x, test_x))
    square, axes = np.linalg.eigh(train_x @ train_x.T)
    kept = square > 1e-10 * square[-1]
    square, axes = square[kept], axes[:, kept]
    train_x, test_x = axes * np.sqrt(square), test_x @ train_x.T @ (axes / np.sqrt(square))
    train_x, test_x = (np.hstack([x, np.ones((len(x), 1))]) for x in (train_x, test_x))  # 1: the bias
    targets = np.eye(int(train_labels.max()) + 1)[train_labels]
    count, features = train_x.shape

    best = 0.0
    weight = np.zeros((features, targets.shape[1]))
    for strength in sorted(l2_strengths, reverse=True):
        penalty = np.append(np.full(features - 1, strength), 0)[:, None]
        rescale = 1 / np.sqrt(0.25 * np.append(square, count)[:, None] / count + penalty)

        def objective(flat: np.ndarray, penalty=penalty, rescale=rescale) -> tuple[float, np.ndarray]:
            weight = flat.reshape(rescale.shape[0], -1) * rescale
            logits = train_x @ weight
            log_p = logits - logsumexp(logits, axis=1, keepdims=True)
            loss = -(log_p * targets).sum() / count + 0.5 * (penalty * weight**2).sum()
            gradient = train_x.T @ (np.exp(log_p) - targets) / count + penalty * weight
            return loss, (gradient * rescale).ravel()

        options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-10, "gtol": 1e-6}
        fit = minimize(objective, (weight / rescale).ravel(), method="L-BFGS-B", jac=True, options=options)
        if not fit.success:
            raise RuntimeError(f"logistic regression at L2 strength {strength} did not converge: {fit.message}")
        weight = fit.x.reshape(features, -1) * rescale
        best = max(best, float(((test_x @ weight).argmax(1) == test_labels).mean()))
    return best
