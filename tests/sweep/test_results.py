"""What a sweep's folder comes to: intervals, choices, fronts, and runs that aren't there."""

import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
from sweep_folders import write_run, write_sweep

from jaxft.errors import UserError
from jaxft.sweep import report
from jaxft.sweep.results import front, gather, interval

RATES = (1e-4, 1e-3)


def lora(rate: float, seed: int) -> dict:
    return {"overrides": {"method": {"class": "LoRA", "rank": 8}, "optimizer.learning_rate": rate, "train.seed": seed}}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values.tolist())
    np.testing.assert_allclose((found.mean - found.half, found.mean + found.half), (expected.low, expected.high), rtol=1e-10)


@pytest.mark.parametrize(("mode", "rate"), [("min", 1e-4), ("max", 1e-3)])
def test_validation_chooses_and_test_is_shown(tmp_path: pathlib.Path, mode: str, rate: float):
    """The figure of the rate that validation chose is shown, though the other one's would be better."""
    write_sweep(tmp_path, [lora(rate, seed) for rate in RATES for seed in (0, 1)], "f1", mode)
    for i, (value, test) in enumerate([(0.3, 0.9), (0.4, 0.8), (0.5, 0.1), (0.6, 0.3)]):
        write_run(tmp_path, f"{i:03d}", [0.45, value], test if mode == "min" else 1 - test, "f1")
    (setting,) = gather(tmp_path).settings()
    assert setting.chosen.learning_rate == rate
    assert setting.figure("f1").mean == pytest.approx({"min": 0.85, "max": 0.8}[mode])


def test_a_tie_goes_to_the_lower_rate_and_fewer_seeds_are_no_candidate(tmp_path: pathlib.Path):
    write_sweep(tmp_path, [lora(rate, seed) for rate in (1e-3, 1e-4, 1e-2) for seed in (0, 1)])
    for i in range(4):
        write_run(tmp_path, f"{i:03d}", [0.5], 0.5)
    write_run(tmp_path, "004", [0.1], 0.1)
    write_run(tmp_path, "005", state={"state": "failed", "attempts": 2, "error": "The loss isn't finite."})
    (setting,) = gather(tmp_path).settings()
    assert setting.chosen.learning_rate == 1e-4


def test_what_a_filter_leaves_out_is_no_row_and_differences_are_from_the_first_that_ran(tmp_path: pathlib.Path):
    kinds = [{"overrides": {"method": {"class": kind}, "train.seed": seed}} for kind in ("Full", "LoRA", "IA3") for seed in range(3)]
    write_sweep(tmp_path, kinds)
    jobs = [[f"{i:03d}"] for i in range(3, 9)]
    (tmp_path / "queue.json").write_text(json.dumps({"session": 1, "jobs": jobs, "open": False}))
    for i in range(3, 9):
        write_run(tmp_path, f"{i:03d}", [0.5], 0.5 + 0.01 * i)
    found = gather(tmp_path)
    assert [row.id for row in found.rows] == [job[0] for job in jobs]
    text = report.markdown(found, [])
    assert "6 runs: 6 done. 3 others of the sweep weren't asked for." in text
    assert "less LoRA's" in text
    assert "on the way" not in text
    write_run(tmp_path, "000", state={"state": "failed", "attempts": 1, "error": "No."})  # by an earlier start, of all
    assert [row.id for row in gather(tmp_path).rows] == ["000", *(job[0] for job in jobs)]


def test_a_search_tunes_all_that_it_draws(tmp_path: pathlib.Path):
    runs = [{"overrides": {"method.dropout": rate, "optimizer.learning_rate": 1e-3}} for rate in (0.0, 0.1)]
    for name, search, rows in (("list", None, 2), ("search", {"trials": 2}, 1)):
        write_sweep(tmp_path / name, runs, vary=[], search=search)
        for i, value in enumerate((0.4, 0.6)):
            write_run(tmp_path / name, f"{i:03d}", [value], 1 - value)
        settings = gather(tmp_path / name).settings()
        assert len(settings) == rows
    assert settings[0].figure("loss").mean == pytest.approx(0.6)  # of the trial that validation chose


def test_differences_are_between_runs_of_one_seed(tmp_path: pathlib.Path):
    """What a seed adds to both falls out: intervals overlap by far, and the difference is sure."""
    bitfit = {"method": {"class": "BitFit"}, "optimizer.learning_rate": 1e-3}
    write_sweep(
        tmp_path, [*(lora(1e-3, seed) for seed in range(3)), *({"overrides": bitfit | {"train.seed": seed}} for seed in (2, 1, 0, 7))]
    )
    figures, apart = (0.5, 0.9, 0.7), np.asarray([0.05, 0.06, 0.04])
    for i, value in enumerate([*figures, *(np.asarray(figures) + apart)[::-1], 0.1]):
        write_run(tmp_path, f"{i:03d}", [0.5], value)
    found = gather(tmp_path)
    first, second = found.settings()
    expected = scipy.stats.ttest_1samp(apart, 0.0).confidence_interval(0.95)
    difference = second.difference(first, "loss")
    np.testing.assert_allclose((difference.mean - difference.half, difference.mean + difference.half), (expected.low, expected.high))
    assert difference.count == 3
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| less LoRA's |" in text
    assert "| LoRA | 0.001 | 0.7000 ± 0.4968 | - | 3 |" in text
    assert f"| BitFit | 0.001 | 0.5875 ± {second.figure('loss').half:.4f} | +0.0500 ± {difference.half:.4f} | 4 |" in text
    assert json.loads((tmp_path / "results.json").read_text())["settings"][1]["difference"]["count"] == 3


def test_the_front_keeps_ties_and_drops_what_another_beats():
    points = np.random.default_rng(0).integers(0, 6, size=(40, 2)).astype(float)
    beaten = [any((other <= own).all() and (other < own).any() for other in points) for own in points]
    assert front([tuple(point) for point in points]) == np.flatnonzero(~np.asarray(beaten)).tolist()


def test_half_a_sweep_is_reported(tmp_path: pathlib.Path):
    """One seed has no interval, a run that failed says why, and names are no HTML."""
    other = {"overrides": {"method": {"class": "<b>$x$|" + "y" * 90}, "optimizer.learning_rate": 1e-3, "train.seed": 0}}
    write_sweep(tmp_path, [lora(1e-3, 0) | {"group": 0}, lora(1e-3, 1), other])
    write_run(tmp_path, "000", [0.5], 0.625, state={"shared": True}, seconds=12.0)
    write_run(tmp_path, "001", state={"state": "failed", "attempts": 2, "error": "It died <twice>."})
    (tmp_path / "runs" / "000" / "metrics.jsonl").open("a").write('{"step": 3')  # a line that is being written
    report.write(tmp_path)
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert "| LoRA | 0.001 | 0.6250 | 1 | 1,000 | 1.000% | 1 GiB † | 200 | 12.0 s † | 2 KiB | +0.2500 | 1 of 2 |" in text
    assert "no interval" in text
    assert "It died &lt;twice&gt;." in page
    assert "<b>$x" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in ("share", "curves", "costs", "rate"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "pictures" / f"{name}.svg").read_text()
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["id"] for row in table] == [row["id"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert table[0]["seconds"] == 12.0
    assert table[2]["after_loss"] is None


def test_figures_are_in_the_table_where_the_first_run_has_none(tmp_path: pathlib.Path):
    write_sweep(tmp_path, [lora(1e-3, 0), lora(1e-3, 1)])
    write_run(tmp_path, "000", state={"state": "failed", "attempts": 2, "error": "The loss isn't finite."})
    write_run(tmp_path, "001", [0.5], 0.625)
    report.write(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["after_loss"] for row in table] == [None, 0.625]


def test_a_table_that_cannot_be_written_is_told(tmp_path: pathlib.Path):
    write_sweep(tmp_path, [lora(1e-3, 0)])
    (tmp_path / "results.parquet").mkdir()
    with pytest.raises(UserError, match="results.parquet can't be written"):
        report.write(tmp_path)


def test_rates_that_read_alike_are_two(tmp_path: pathlib.Path):
    rates = (1.2345678e-3, 1.2345679e-3)
    write_sweep(tmp_path, [lora(rate, seed) for rate in rates for seed in (0, 1)])
    for i in range(4):
        write_run(tmp_path, f"{i:03d}", [0.5], 0.5)
    (setting,) = gather(tmp_path).settings()
    assert [(one.tuned, len(one.rows)) for one in setting.candidates] == [(str(rate), 2) for rate in rates]


def test_what_nobody_measured_has_no_column(tmp_path: pathlib.Path):
    write_sweep(tmp_path, [lora(1e-3, 0), lora(1e-3, 1)], workers=3)
    write_run(tmp_path, "000", [0.5], 0.5, eval={"before": {"loss": 1.1}, "after": {"loss": 0.5}})
    found = gather(tmp_path)
    assert "forgetting" not in report.methods(found).columns
    assert any("config.eval.general" in note for note in report.notes(found))
    assert any("Up to 2 runs went at a time" in note for note in report.notes(found))


def test_a_sweep_before_its_first_run_ends_has_a_report(tmp_path: pathlib.Path):
    write_sweep(tmp_path, [lora(1e-3, 0)])
    report.write(tmp_path)
    assert "1 run: 1 waiting." in (tmp_path / "report.html").read_text()


def test_a_folder_without_a_sweep_is_told(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="holds no sweep"):
        gather(tmp_path)


HELD = {"model": {"quantization": "none", "double_quantization": True, "block_size": 64, "source": "tiny"}}
LORA, NF4, DOUBLE = {"class": "LoRA", "rank": 8}, {"model.quantization": "nf4"}, {"model.double_quantization": False}


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([{"method": LORA}, {"method": LORA, **NF4}, {"method": {"class": "IA3"}}], ["LoRA", "LoRA, nf4", "IA3"]),
        ([{"method": LORA}, {"method": LORA | {"dora": True}}, {"method": LORA | {"rank": 4}}], ["LoRA rank 8", "DoRA", "LoRA rank 4"]),
        ([{"model.quantization": "none"}, NF4], ["quantization none", "nf4"]),
        ([{"method.rank": rank, "method.alpha": 2.0 * rank} for rank in (8, 16)], ["rank 8, alpha 16", "rank 16, alpha 32"]),
        (
            [{"model.quantization": "none"}, {"model.quantization": "int8"}, NF4, NF4 | DOUBLE, NF4 | {"model.block_size": 256}],
            ["quantization none", "int8", "nf4", "nf4, no double quantization", "nf4, block size 256"],
        ),
    ],
)
def test_a_label_says_what_differs_from_the_base(tmp_path: pathlib.Path, runs: list, labels: list):
    vary = ("method", "model.quantization", "model.double_quantization", "model.block_size")
    vary = tuple(runs[0]) if "method.rank" in runs[0] else vary if "method" in runs[0] else vary[1:]
    write_sweep(tmp_path, [{"overrides": run} for run in runs], vary=vary, config=HELD | {"method": LORA | {"alpha": 16.0}})
    assert [row.setting for row in gather(tmp_path).rows] == labels


def test_only_what_trained_together_is_marked(tmp_path: pathlib.Path):
    """By what became of the runs: one that was put into a population may have trained alone in the end."""
    write_sweep(tmp_path, [lora(1e-3, seed) | {"group": 0} for seed in (0, 1)])
    write_run(tmp_path, "000", [0.5], 0.5)
    write_run(tmp_path, "001", [0.5], 0.5)
    assert not gather(tmp_path).settings()[0].is_shared
    (tmp_path / "runs" / "001.json").write_text(json.dumps({"state": "done", "shared": True}))
    assert gather(tmp_path).settings()[0].is_shared
