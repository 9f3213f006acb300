"""The pages of all fields and of the Python interface."""

import pathlib
import runpy

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_the_pages_are_in_step_with_the_code():
    generate = runpy.run_path(str(DOCS / "generate.py"))
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generate["page"](), "run: python docs/generate.py"
    assert (DOCS / "api.md").read_text(encoding="utf-8") == generate["api_page"](), "run: python docs/generate.py"


def test_everything_public_says_what_it_is():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert "jaxft.load_pretrained(" in text
    assert "```text\n\n```" not in text
    assert " object at 0x" not in text


def test_every_field_says_what_it_means():
    rows = [line for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `config.")]
    assert rows
    assert not [row for row in rows if row.endswith("|  |")]
