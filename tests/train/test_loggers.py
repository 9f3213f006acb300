"""Loggers beside TensorBoard, read back with their own libraries."""

import json
import struct
import sys

import pytest

import experiments
import jaxft.config
from jaxft import overrides
from jaxft.errors import UserError
from jaxft.train import loggers
from jaxft.train.logs import Logs
from jaxft.train.setup import check

BLOCK, HEAD = 32768, 7  # bytes of LevelDB's log format, which W&B's files are


def experiment(name, **fields):
    flags = [f"--config.train.loggers={name}", *(f"--config.{path}={value}" for path, value in fields.items())]
    return overrides.parse_flags(experiments.load("lora_llama2"), flags)


def run(folder, asked, start, stop, complete=True):
    """Writes the figures of a run's steps from one to another, every other one with those of an evaluation."""
    logs = Logs(folder, start, 9, loggers.opened(asked, folder, start))
    for step in range(start + 1, stop + 1):
        logs.write(step, {"loss": step / 2})
        if step % 2 == 0:
            logs.write(step, {"validation_loss": float(step)})
    if not complete:
        logs.close()
        return
    with logs.end(stop) as figures:
        figures["test_loss"] = 0.25


def expected(stop, complete=True):
    steps = {"loss": [(step, step / 2) for step in range(1, stop + 1)], "validation_loss": [(s, float(s)) for s in range(2, stop + 1, 2)]}
    return steps | {"test_loss": [(stop, 0.25)] if complete else []}


def of_mlflow(folder):
    """Returns the runs of a folder's store: their state, their parameters, and of each figure steps and values in the order written."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    number = client.get_experiment_by_name("lora_llama2").experiment_id
    return [
        (
            found.info.status,
            found.data.params,
            {n: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, n)] for n in expected(9)},
        )
        for found in client.search_runs([number], order_by=["attributes.start_time ASC"])
    ]


def test_a_stopped_run_goes_on_in_mlflow_and_no_step_is_written_twice(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = experiment("mlflow")
    run(tmp_path, asked, 0, 5, complete=False)
    assert [status for status, *_ in of_mlflow(tmp_path)] == ["KILLED"]
    run(tmp_path, asked, 3, 6)
    ((status, config, figures),) = of_mlflow(tmp_path)
    assert status == "FINISHED"
    assert figures == expected(6)
    assert config["method.rank"] == "8"
    assert len(config) == len(dict(overrides.flat(overrides.to_dict(asked))))


def test_a_run_given_up_before_its_first_checkpoint_leaves_another_one_its_own(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run(tmp_path, experiment("mlflow"), 0, 2, complete=False)
    run(tmp_path, experiment("mlflow"), 0, 3, complete=False)  # the same: it goes on
    run(tmp_path, experiment("mlflow", **{"optimizer.learning_rate": 0.5}), 0, 4)
    assert [(status, figures) for status, _, figures in of_mlflow(tmp_path)] == [
        ("KILLED", expected(3, complete=False)),
        ("FINISHED", expected(4)),
    ]


def records(path):
    """Yields the messages of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    content, start, parts = path.read_bytes(), HEAD, []  # the file has a head of its own
    while start < len(content):
        left = BLOCK - start % BLOCK
        if left < HEAD:
            start += left
            continue
        _, length, kind = struct.unpack("<IHB", content[start : start + HEAD])
        parts.append(content[start + HEAD : start + HEAD + length])
        start += HEAD + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def of_wandb(folder):
    """Returns the ids under which runs were written offline, and of each figure steps and values in the order written."""
    ids, found = set(), {name: [] for name in expected(9)}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in found.keys() & items.keys():
                found[name].append((items["_step"], items[name]))
    return ids, found


def test_a_stopped_run_goes_on_in_wandb_offline_and_no_step_is_written_twice(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = experiment("wandb")
    run(tmp_path, asked, 0, 5, complete=False)
    run(tmp_path, asked, 3, 6)
    ids, figures = of_wandb(tmp_path)
    assert len(ids) == 1
    assert figures == expected(6)


class Broken:
    """A logger that takes no figure."""

    id = "1"

    def __init__(self, run):
        pass

    def write(self, step, values):
        raise ConnectionError("nobody\nis there")

    def close(self, complete):
        raise ConnectionError("nobody")


def test_a_logger_that_refuses_is_told_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.KNOWN, "mlflow", Broken)
    logs = Logs(tmp_path, 0, 9, loggers.opened(experiment("mlflow"), tmp_path, 0))
    with pytest.raises(UserError, match="The logger mlflow refused the figures of a step: nobody. The last whole checkpoint is kept"):
        logs.write(1, {"loss": 1.0})
    logs.close()  # what is told is the first cause
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_what_is_asked_wrong_is_told_before_anything_is_loaded(monkeypatch):
    with pytest.raises(UserError, match="no logger 'wandbb'. Did you mean 'wandb'"):
        check(experiment("wandbb"))
    with pytest.raises(UserError, match="names mlflow twice"):
        check(experiment("mlflow,mlflow"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        loggers.check_installed(("wandb",))


def test_they_are_off_by_default():
    assert jaxft.config.TrainConfig().loggers == ()
