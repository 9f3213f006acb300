"""The confusion matrix as a picture."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MOST = 30  # labels whose numbers can still be read


def confusion_picture(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Returns a PNG: true labels down, predicted ones across, the colour the share of the true label's rows.

    Args:
      counts: (labels, labels) int, rows by true and predicted label; of more than 30, the 30 with most rows are shown.
      names: of the labels.
    """
    chosen = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:_MOST])
    shown, names = counts[np.ix_(chosen, chosen)], [names[i] for i in chosen]
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
