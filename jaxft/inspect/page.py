"""The look as one HTML page with its pictures in it: no script, nothing from elsewhere."""

import pathlib

import jinja2
import markupsafe

from jaxft.inspect.findings import shortened
from jaxft.inspect.look import Look, label_counts, length_statistics

_TEMPLATE = pathlib.Path(__file__).with_name("page.html.jinja")
_CASES = 50  # of a finding on the page
_ROWS = 6  # of a case
_EXCERPT = 700  # characters of a row


def page(look: Look) -> str:
    """Returns the page."""
    from jaxft.inspect import pictures  # matplotlib takes half a second to import, which only the page needs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shortened"] = shortened
    labels = label_counts(look.sets)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        look=look,
        lengths=[length_statistics(one) for one in look.encoded],
        lengths_picture=markupsafe.Markup(pictures.lengths(look.sets, look.encoded, look.data.max_length)),
        labels=labels,
        label_pictures={name: markupsafe.Markup(pictures.balance(values, look.sets)) for name, values in labels.items()},
        most_bars=pictures.MOST_BARS,
        most_cases=_CASES,
        most_rows=_ROWS,
        excerpt=_EXCERPT,
    )
