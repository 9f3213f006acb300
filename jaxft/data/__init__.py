"""From rows to batches: sources, conversations, tokens and masks, packing, batches."""
