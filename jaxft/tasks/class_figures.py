"""Figures of classes by scikit-learn and SciPy, and the confusion matrix as a picture."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from sklearn import metrics as sk
from threadpoolctl import threadpool_limits

from jaxft.models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from jaxft.tasks.base import Report, by_class
from jaxft.tasks.word_counts import MOST_TEXTS, WORD, word_model

_MOST = 30  # labels whose numbers can still be read


def confusion_picture(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Returns a PNG: true labels down, predicted ones across, the colour the share of the true label's rows.

    Args:
      counts: (labels, labels) int, rows by true and predicted label; of more than 30, the 30 with most rows are shown.
      names: of the labels.
    """
    chosen = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:_MOST])
    shown, names = counts[np.ix_(chosen, chosen)], [names[i].replace("$", r"\$") for i in chosen]  # no formulas
    shares = shown / np.maximum(counts[chosen].sum(axis=1, keepdims=True), 1)
    size = 2.0 + 0.55 * len(chosen)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*shown.shape):
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{shown[row, column]:,}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true label's rows", shrink=0.8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def word_logits(texts: Sequence[str], classes: np.ndarray, held_out: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Returns the log-probabilities, (held_out, count) float32, of logistic regression on TF-IDF of words and pairs of words.

    Args:
      texts: to train on; of more than 20,000 so many are drawn.
      classes: (texts,) int.
      held_out: to classify.
      count: of the classes; one that training lacks gets the probability of a single row. Where training has no word, all are alike.
      seed: of the draw.
    """
    if len(texts) > MOST_TEXTS:
        drawn = np.random.default_rng((seed, *b"words")).choice(len(texts), MOST_TEXTS, replace=False)
        texts, classes = [texts[i] for i in drawn], classes[drawn]
    model = word_model(2, balanced=False)
    found = np.full((len(held_out), count), 1 / len(texts))
    if len(np.unique(classes)) > 1 and any(re.search(WORD, text) for text in texts):
        with threadpool_limits(1):  # products this small are slower, up to thirty times, on several threads
            model.fit(texts, classes)
            found[:, model.classes_] = model.predict_proba(held_out)
    return np.log(found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def class_report(true: np.ndarray, outputs: np.ndarray, names: Sequence[str], problem: str) -> Report:
    """Returns precision, recall and F1 of each label, and of single labels the confusion matrix; arguments as of `figures`."""
    made, every = _predicted(outputs, problem), np.arange(len(names))
    columns = sk.precision_recall_fscore_support(true, made, labels=every, zero_division=0)
    tables = (by_class("By label", ("label", "rows"), names, columns),)
    if problem == MULTI_LABEL:
        return Report(tables)
    return Report(tables, {"confusion.png": confusion_picture(sk.confusion_matrix(true, made, labels=every), names)})


def _predicted(outputs: np.ndarray, problem: str) -> np.ndarray:
    return outputs.argmax(axis=1) if problem == SINGLE_LABEL else (outputs > 0).astype(np.int64)


def figures(true: np.ndarray, outputs: np.ndarray, problem: str) -> dict[str, float]:
    """Returns the metrics of a head's outputs.

    Args:
      true: (texts,) int classes, or (texts, labels) 0 and 1, or (texts, numbers).
      outputs: (texts, labels) logits, or (texts, numbers).
      problem: as transformers names it.
    """
    if problem == REGRESSION:
        return {"pearson": _correlation(stats.pearsonr, true, outputs), "spearman": _correlation(stats.spearmanr, true, outputs)}
    made = _predicted(outputs, problem)
    macro = float(sk.f1_score(true, made, average="macro", zero_division=0))
    accuracy = float(sk.accuracy_score(true, made))
    if problem == MULTI_LABEL:
        return {"accuracy": accuracy, "micro_f1": float(sk.f1_score(true, made, average="micro", zero_division=0)), "macro_f1": macro}
    return {"accuracy": accuracy, "macro_f1": macro, "mcc": float(sk.matthews_corrcoef(true, made))}


def _correlation(function: Any, true: np.ndarray, made: np.ndarray) -> float:
    """The mean over columns; 0 where one of the two is constant, or there are fewer than two rows."""
    found = []
    for one, other in zip(true.T, made.T, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            value = function(one, other).statistic if len(one) > 1 else 0.0
        found.append(float(value) if np.isfinite(value) else 0.0)
    return float(np.mean(found))
