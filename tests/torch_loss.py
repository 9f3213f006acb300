"""The reference's loss of jaxft's examples."""

import numpy as np
import torch


def torch_loss(tuned, examples):
    """The mean over all scored tokens of the examples, each a padded row, by a model of transformers or peft."""
    longest = int(examples.lengths.max())
    ids, mask, labels = (np.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for i in range(len(examples)):
        tokens, scored = examples[i]
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, : len(tokens)] = np.where(scored, tokens, -100)
    ids, mask, labels = (torch.tensor(array) for array in (ids, mask, labels))
    return tuned(ids, attention_mask=mask, labels=labels).loss  # transformers shifts the labels
