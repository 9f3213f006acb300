"""Masks of a few sentences through training, as a picture."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDEST = 28  # tokens of a sentence that are drawn
_HIDDEN, _ENTITY, _FREE = "#3b6ea8", "#b03a3a", "#222222"
_DOTS = 130  # an inch


def picture(steps: Sequence[int], hidden: np.ndarray, sentences: Sequence[tuple[int, Sequence[str], Sequence[bool]]]) -> bytes:
    """Returns a PNG: for each sentence a grid of its tokens by the steps, what is hidden filled; tokens of entities are red.

    Args:
      steps: of each look.
      hidden: (looks, rows, length) bool.
      sentences: the row, its first tokens as text, and which of them are of entities.
    """
    size = (11.0, (1.5 + 0.17 * len(steps)) * len(sentences))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (row, texts, entities) in zip(np.atleast_1d(figure.subplots(len(sentences))), sentences, strict=True):
        shown = hidden[:, row, : len(texts)]
        colors = np.where(shown[..., None], _rgb(_HIDDEN), _rgb("#f2f2f2"))
        axes.imshow(colors, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(texts)), [text.replace("$", r"\$") for text in texts], rotation=60, ha="right", fontsize=8)
        for label, entity in zip(axes.get_xticklabels(), entities, strict=True):
            label.set_color(_ENTITY if entity else _FREE)
        axes.set_yticks(range(len(steps)), [str(step) for step in steps], fontsize=7)
        axes.set_ylabel("step", fontsize=8)
        axes.set_xticks(np.arange(len(texts)) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(steps)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
    figure.suptitle("What the policy hides, through training (filled)", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DOTS, metadata={"Software": None})
    return out.getvalue()


def _rgb(color: str) -> Any:
    return np.asarray([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
