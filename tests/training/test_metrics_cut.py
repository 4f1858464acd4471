"""metrics.jsonl after a resume: cut back to the restored step, so that none is doubled and none missing."""

import json

import pytest

from tlinformer_jax.training.metrics import MetricsLog

EVENTS = [(1, "train/loss"), (2, "train/loss"), (2, "eval/loss"), (3, "train/loss"), (4, "eval/loss")]


def written(path):
    return [(event["step"], next(key for key in event if key != "step")) for event in map(json.loads, open(path))]


@pytest.mark.parametrize(
    ("step", "keep_evaluation", "left"), [(0, True, 0), (1, False, 1), (2, False, 2), (2, True, 3), (9, False, 5)]
)
@pytest.mark.parametrize("torn", ["", '{"step": 5, "train/lo', '{"step": 1'])
def test_later_events_and_a_torn_line_are_dropped(step, keep_evaluation, left, torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": number, key: 1.5}) + "\n" for number, key in EVENTS) + torn)
    with MetricsLog(tmp_path, step=step, keep_evaluation=keep_evaluation) as log:
        log.write(7, {"train/loss": 0.5})
        log.sync()
        assert written(path) == [*EVENTS[:left], (7, "train/loss")]


def test_damage_that_no_kill_explains_is_told(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.5}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + "\n{torn")
    MetricsLog(tmp_path, step=3).close()
    assert capfd.readouterr().err == ""
    path.write_text("\n".join([lines[0], lines[1][1:], lines[2]]) + "\n")
    MetricsLog(tmp_path, step=3).close()
    assert "metrics.jsonl: 1 damaged lines are dropped" in capfd.readouterr().err
    assert [step for step, _ in written(path)] == [1, 3]


def test_tensorboard_is_told_from_where_the_steps_are_repeated(tmp_path):
    loader = pytest.importorskip("tensorboardX.proto.event_pb2")
    record = pytest.importorskip("tensorboardX.record_writer")
    assert record
    with MetricsLog(tmp_path, step=6) as log:
        log.write(7, {"train/loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, starts = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = loader.Event.FromString(data[12 : 12 + length])
        if event.HasField("session_log"):
            starts.append(event.step)
        data = data[16 + length :]
    assert starts == [7]
