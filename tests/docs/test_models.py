"""The page of models and tasks: its example runs, and its table is that of the code."""

import pathlib
import re

import jaxft
from jaxft.models import heads
from jaxft.models.registry import FAMILIES, tasks_of

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_its_example_runs():
    given = {"jaxft": jaxft}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, given)
    assert given["model"].config.labels == ("negative", "positive")
    assert all(part in given["params"] for part in given["model"].head)


def test_its_table_has_every_family_and_the_tasks_that_it_has():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ") and "..." in line]
    header, *families = rows
    assert tuple(header[2:]) == heads.TASKS
    found = {stem: {task for task, cell in zip(heads.TASKS, row[2:], strict=True) if cell} for row in families for stem in _stems(row[1])}
    expected = {}
    for family in FAMILIES:
        for kind in dict.fromkeys(kind.model_type for kind in family.module.ARCHITECTURES.values()):
            tasks = tasks_of(kind)
            expected[tasks[heads.SEQUENCE_CLASSIFICATION].removesuffix(heads.SUFFIXES[heads.SEQUENCE_CLASSIFICATION])] = set(tasks)
    assert found == expected


def test_its_names_are_those_of_the_layers():
    for stem in ("bert", "gpt2", "llama"):
        kind = next(family for family in FAMILIES if stem in family.module.__name__)
        modules = {path.split("{layer}/")[1].rpartition("/")[0] for _, path, _ in kind.module.HF_NAMES if "{layer}" in path}
        missing = [name for name in modules if f"`{name.rpartition('/')[2]}`" not in PAGE and f"`{name}`" not in PAGE]
        assert set(missing) <= {"attention/q_norm", "attention/k_norm"}


def _stems(cell):
    return re.findall(r"`(\w+)\.\.\.`", cell)
