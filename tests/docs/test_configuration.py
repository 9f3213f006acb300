"""The page of all fields."""

import pathlib
import runpy

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_the_page_is_in_step_with_the_configuration():
    generate = runpy.run_path(str(DOCS / "generate.py"))
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generate["page"](), "run: python docs/generate.py"


def test_every_field_says_what_it_means():
    rows = [line for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `config.")]
    assert rows
    assert not [row for row in rows if row.endswith("|  |")]
