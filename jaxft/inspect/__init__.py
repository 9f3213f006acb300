"""A look at the data before it is trained on: what it holds, and what is wrong with it.

Rows are read into `Texts` (texts.py); pure functions turn those into `Finding`s (copies.py, labels.py, lengths.py); look.py puts them
together, and report.py, page.py and pictures.py say them as text, JSON and HTML.
"""
