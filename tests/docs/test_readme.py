"""The figures of README.md: those that the demo's docstring and the benchmarks' records have."""

import pathlib
import re

from experiments import lora_llama2

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def record(name):
    """Returns the lines of a benchmark's report that are rows of tables, as their cells."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    return text, [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def section(title):
    """Returns one section's text, and its tables' rows."""
    text = README.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return text, [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_demo_has_the_figures_of_its_experiment():
    said = " ".join(lora_llama2.__doc__.split())
    text, rows = section("Start")
    untuned, majority, tuned = rows[2:]
    assert f"tuned {tuned[1]}, {tuned[2]}, {tuned[3]} ({tuned[4]})" in said
    assert f"majority answer {majority[1]}, {majority[2]}, {majority[3]}" in said
    assert untuned[1:4] == ["0.0%"] * 3
    assert f"untuned 0% ({untuned[4]})" in said
    seconds = re.findall(r"(\d+) s (?:in all )?on ", text)
    assert len(seconds) == 4
    assert all(f"{one} s in all" in said for one in seconds)


def test_speed_is_that_of_the_records():
    text, rows = section("Speed and memory")
    lines = " ".join(text.split())
    report, measured = record("sft")
    for row in rows[2:]:
        assert any(cells[-2:] == [row[1], row[2].removesuffix(" GB")] for cells in measured), row
    over_floor = re.search(r"takes ([\d.]+) times the sum of its products", lines)[1]
    assert f"A step takes {over_floor} times its floor" in report
    apart = float(re.search(r"the losses agree to ([\de-]+) of their value", lines)[1])
    assert f"{float(re.search(r'differ by ([^ ]+) of their value', report)[1]):.0e}" == f"{apart:.0e}"


def test_methods_and_qlora_are_those_of_the_records():
    lines = " ".join(section("Speed and memory")[0].split())
    _, measured = record("methods")
    ratios = [float(cells[measured[0].index("speed ratio")]) for cells in measured[2:] if cells[0] != "lora"]
    least, most = re.search(r"trains ([\d.]+) to ([\d.]+) times as many tokens", lines).groups()
    assert (least, most) == (f"{min(ratios):.1f}", f"{max(ratios):.1f}")
    sides = {cells[0]: cells for cells in record("qlora")[1]}
    lora, qlora, theirs = (sides[name] for name in ("jaxft, LoRA", "jaxft, QLoRA", "PEFT and bitsandbytes, QLoRA"))
    peak, slower = sides["side"].index("peak, GB"), sides["side"].index("of LoRA's step")
    found = re.search(r"the peak is ([\d.]+) GB in place of ([\d.]+); PEFT .* takes ([\d.]+) times as long and ([\d.]+) GB", lines)
    assert found.groups() == (qlora[peak], lora[peak], f"{float(theirs[slower]):.1f}", theirs[peak])
