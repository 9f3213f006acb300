"""What a run writes as it goes."""

import json
import struct

import pytest
from full_disk import full_above
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxft.errors import UserError
from jaxft.train import board
from jaxft.train.logs import Logs


def events(path):
    """Returns the events of a file, as TensorBoard reads them: length, checksum, event, checksum."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def shown(folder):
    """Returns step and value of each loss: a file hides what those before it have from its first step on."""
    losses = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                losses = {step: value for step, value in losses.items() if step < event.step}
            if event.summary.value:
                losses[event.step] = event.summary.value[0].simple_value
    return losses


def run(folder, start, stop):
    """Writes the lines of a run's steps from one to another."""
    logs = Logs(folder, start, 9)
    for step in range(start + 1, stop + 1):
        logs.write(step, {"loss": step / 2})
    logs.close()


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    run(tmp_path, 0, 5)
    run(tmp_path, 3, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 2} for step in range(1, 7)]
    assert shown(tmp_path / "tensorboard") == {step: step / 2 for step in range(1, 7)}


def fill(logs):
    """Writes more lines than there is room for."""
    for step in range(2000):
        logs.write(step, {"loss": 1.0})


def test_a_full_disk_is_told_and_nothing_waits(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(board, "_FLUSH_SECONDS", 0.0)
    logs = Logs(tmp_path, 0, 9)
    with full_above(20_000), pytest.raises(UserError, match="can't be written .* The last whole checkpoint is kept"):
        fill(logs)
    with full_above(20_000):
        logs.close()
    assert "Traceback" not in capfd.readouterr().err
