"""Checkpoints record their data: resuming with other problems or another split is refused."""

import json
from pathlib import Path

import pytest
import yaml

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.data.fingerprint import difference, fingerprint
from opsd_train.data.problems import Problem
from opsd_train.evaluation.sets import load_set
from opsd_train.evaluation.settings import EvalConfig
from tests.helpers.course import assert_same_course
from tests.helpers.tiny import recipe

HERE = Path("runs/a/checkpoints/step_000004")


def problems(*numbers: int, **more: str) -> list[Problem]:
    return [Problem(f"p-{n}", f"q{n}", f"a{n}", f"s{n}", **more) for n in numbers]


def changed(old: tuple, new: tuple) -> str | None:
    prints = [fingerprint(*(problems(*part) for part in parts)) for parts in (old, new)]
    return difference(*(json.loads(json.dumps(made)) for made in prints), HERE)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (([1, 2, 3, 4], [5, 6]), None),
        (([1, 2, 3, 4, 7], [5, 6]), "(4 + 2 held out): it is now 5 + 2 held out, 1 new"),
        (([1, 2, 3], [5, 6]), "it is now 3 + 2 held out, 1 gone"),
        (([1, 2, 5, 4], [3, 6]), "it is now 4 + 2 held out, 1 now held out"),
        (([8, 9, 3, 4], [5, 1]), "2 new, 2 gone, 1 now held out"),
        (([2, 1, 3, 4], [5, 6]), "from other rows or in another order"),
        (([1, 2, 3, 4], [6, 5]), "from other rows or in another order"),
        (([1, 2, 3, 4, 5], [6]), "it is now 5 + 1 held out"),
    ],
)
def test_changes_are_described(new: tuple, words: str | None) -> None:
    found = changed(([1, 2, 3, 4], [5, 6]), new)
    assert found is words is None or words in found
    assert found is None or len(found) < 150


@pytest.mark.parametrize("field", ["question", "answer", "solution"])
def test_every_text_counts(field: str) -> None:
    from dataclasses import replace

    one = problems(1, 2)
    other = [one[0], replace(one[1], **{field: "other"})]
    assert difference(fingerprint(one, []), fingerprint(other, []), HERE) is not None
    renamed = [replace(problem, id=f"{problem.id}1") for problem in one]  # a curriculum's memory
    assert "other rows" in difference(fingerprint(one, []), fingerprint(renamed, []), HERE)


def rows(path: Path, count: int, answer: str = "{}") -> None:
    lines = [
        {"question": f"{i} + 1?", "answer": answer.format(i + 1), "solution": str(i + 1)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_resume_with_other_data_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("opsd_train.run.write_report", lambda folder: None)
    data, path = tmp_path / "d.jsonl", tmp_path / "r.yaml"
    made = recipe(tiny_folder, tmp_path / "run") | {"method": "sft", "problems_per_step": 10}
    made["data"] = {"source": "file", "path": str(data), "train_size": None, "heldout_size": 20}
    path.write_text(yaml.safe_dump(made))
    rows(data, 60)
    assert cli.main([str(path), "steps=4", f"output_dir={tmp_path / 'straight'}"]) == 0
    assert cli.main([str(path), "steps=2"]) == 0
    again = [str(path), "steps=4", "--resume"]
    capsys.readouterr()
    for count, answer, words in (
        (90, "{}", ["(40 + 20 held out): it is now 70 + 20 held out", "30 new"]),
        (59, "{}", ["1 gone"]),
        (60, "{} apples", ["60 new, 60 gone"]),
    ):
        rows(data, count, answer)
        assert cli.main(again) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(word in line for word in ["error: the data is not that of", *words]), line
        assert len(line) < 200 and "output_dir" in line
        with pytest.raises(UserError, match="--set heldout: the data is not that of"):
            load_set(str(tmp_path / "run"), settings(), None)

    rows(data, 60)
    data.write_text(data.read_text().replace("}\n", ', "more": 1}\n'))  # the same problems
    assert len(load_set(str(tmp_path / "run"), settings(), None)) == 6
    assert cli.main(again) == 0
    (tmp_path / "run" / "checkpoints" / "step_000004" / "trainer_state.json").write_text("{")
    assert len(load_set(str(tmp_path / "run"), settings(), None)) == 6
    assert_same_course(tmp_path / "run", tmp_path / "straight")


def settings() -> EvalConfig:
    from opsd_train.config.load import config_from, load_recipe

    return config_from(load_recipe("demo/eval", "eval") | {"output_dir": "x"}, [], EvalConfig)


def test_a_checkpoint_without_a_fingerprint_is_said(
    tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("opsd_train.run.write_report", lambda folder: None)
    path = tmp_path / "r.yaml"
    made = recipe(tiny_folder, tmp_path / "run") | {"method": "sft"}
    path.write_text(yaml.safe_dump(made))
    with monkeypatch.context() as patch:  # as it was written before
        patch.setattr("opsd_train.trainer.fingerprint", lambda train, heldout: None)
        assert cli.main([str(path), "steps=1", "evaluation.problems=0"]) == 0
    assert cli.main([str(path), "steps=2", "evaluation.problems=0", "--resume"]) == 0
    assert "warning: step_000001 does not say what data it is of" in capsys.readouterr().out
