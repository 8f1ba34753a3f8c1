"""Trackers are called as W&B and trackio want it, here with stand-ins in their place."""

import sys
from functools import partial
from types import ModuleType

import pytest

from opsd_train.config.errors import UserError
from opsd_train.reporting.trackers import open_trackers

ROW = {"loss": 0.5, "tokens": 3, "top_tokens": [["a", 0.5, 2]], "warnings": ["!"], "kl": None}


@pytest.fixture
def calls(monkeypatch):
    """What was called at the stand-ins for both packages, in order."""
    made = []

    def record(package, function, /, *args, **kwargs):
        made.append((package, function, args, kwargs))

    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.Error = type("Error", (Exception,), {})
        for function in ("init", "log", "finish"):
            setattr(module, function, partial(record, name, function))
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_runs_are_opened_fed_and_closed(calls, tmp_path):
    config = {"optim": {"lr": 0.1}}
    trackers = open_trackers(["wandb", "trackio"], tmp_path / "run-2", config)
    for tracker in trackers:
        tracker.log(7, ROW)
        tracker.finish()
    told = {"project": "opsd_train", "name": "run-2", "config": config}
    assert calls == [
        ("wandb", "init", (), told | {"dir": str(tmp_path / "run-2")}),
        ("trackio", "init", (), told),
        ("wandb", "log", ({"loss": 0.5, "tokens": 3},), {"step": 7}),
        ("wandb", "finish", (), {}),
        ("trackio", "log", ({"loss": 0.5, "tokens": 3},), {"step": 7}),
        ("trackio", "finish", (), {}),
    ]


def test_none_asked_for(calls, tmp_path):
    assert open_trackers([], tmp_path, {}) == [] and calls == []


def test_a_package_that_is_missing(calls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"trackio is not installed; pip install trackio"):
        open_trackers(["wandb", "trackio"], tmp_path, {})
    assert calls == []  # none is started before all are there


def test_wandb_that_does_not_start(calls, tmp_path, monkeypatch):
    def refuse(**_):
        raise sys.modules["wandb"].Error("No API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"does not start: No API key configured"):
        open_trackers(["wandb"], tmp_path, {})
