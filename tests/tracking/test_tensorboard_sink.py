"""What TensorBoard's own reader finds in the event files of a run."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.tracking.protocol import missing_package
from rlhf_exp.tracking.tensorboard_sink import TensorBoardLogger

from .wandb_runs import info


def log_phases(path: Path, *phases: int, score: float) -> None:
    """A process that logs these phases."""
    with RunFolder(path, lambda: TensorBoardLogger().open(info(path))) as folder:
        folder.start()
        for phase in phases:
            folder.log(phase, {"eval/score": score + phase, "eval/kl": phase / 8})
            folder.log_samples(phase, [{"prompt": "p", "completion": f"a|b\n{phase}"}])
            counts, edges = (phase, 0, 2), (0.0, 0.5, 1.0, 1.5)
            folder.log_histograms(phase, {"ratio": Histogram(counts=counts, edges=edges)})
            folder.log_samples(phase, [])


def read(path: Path) -> EventAccumulator:
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    folder = str(path / "shared" / "tensorboard" / "run")
    return EventAccumulator(folder, size_guidance=everything).Reload()


def test_every_metric_histogram_and_sample_stands_at_its_phase(tmp_path):
    log_phases(tmp_path, 1, 3, score=0.5)
    events = read(tmp_path)
    assert {*events.Tags()["scalars"]} == {"eval/score", "eval/kl"}
    assert [(e.step, e.value) for e in events.Scalars("eval/score")] == [(1, 1.5), (3, 3.5)]
    [first, second] = events.Histograms("histogram/ratio")
    assert (first.step, second.step) == (1, 3)
    value = second.histogram_value
    assert (value.min, value.max, value.num) == (0.0, 1.5, 5)
    assert (value.bucket_limit, value.bucket) == ([0.5, 1.0, 1.5], [3, 0, 2])
    samples = events.Tensors("samples/text_summary")
    assert [e.step for e in samples] == [1, 3]
    text = samples[1].tensor_proto.string_val[0].decode()
    assert text == '```\n{"prompt": "p", "completion": "a|b\\n3"}\n```'


def test_a_resumed_run_goes_on_in_its_folder_without_doubling_phases(tmp_path):
    log_phases(tmp_path, 0, 1, 2, 3, score=0.0)
    log_phases(tmp_path, 2, 3, 4, score=10.0)  # from a checkpoint after phase 1
    events = read(tmp_path)
    scores = [(e.step, e.value) for e in events.Scalars("eval/score")]
    assert scores == [(0, 0), (1, 1), (2, 12), (3, 13), (4, 14)]
    assert [e.step for e in events.Histograms("histogram/ratio")] == [0, 1, 2, 3, 4]
    server = plugin_event_accumulator.EventAccumulator(str(events.path)).Reload()
    assert [e.step for e in server.Tensors("samples/text_summary")] == [0, 1, 2, 3, 4]


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    assert TensorBoardLogger().problems(name="run", group=None) == []
    assert missing_package("no_such_tracker") == [
        "logger: no_such_tracker is not installed: pip install 'rlhf_exp[no_such_tracker]'"
    ]


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(tmp_path, caplog):
    (tmp_path / "shared").write_text("a file, not a folder")
    log_phases(tmp_path, 1, 2, score=0.5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("TensorBoardSink failed") == 1


@pytest.mark.parametrize("extra", ["tensorboard", "trackio"])
def test_the_extras_that_the_message_names_exist(extra):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\n{extra} = ["{extra}>=' in project
