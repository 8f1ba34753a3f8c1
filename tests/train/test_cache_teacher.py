"""A teacher's cache: written, continued, refused; and the same loss as the teacher in memory."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from opsd_train import cli
from opsd_train.cache_teacher import cache_teacher
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data import teacher_cache
from opsd_train.data.teacher_cache import TeacherCache
from opsd_train.dry_run.plan import dry_run, expected
from tests.helpers import tiny
from tests.helpers.pair import alone
from tests.helpers.steps import Course, Outcome, assert_same_steps, follow, make_trainer

VOCAB = 261  # the student's; the teacher's is padded to 270
PARTS = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
METHOD = ("method=distill", "distill.on_policy=false", "distill.dtype=float32")
TOP = ("loss.objective=top_k", "loss.temperature=1.3")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of the recipe's 20 problems."""
    monkeypatch.setattr(teacher_cache, "PART_PROBLEMS", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a wider teacher whose vocabulary is padded."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "student")
    tiny.save_model(folder / "teacher")
    tiny.make_model(vocab_size=270, hidden_size=48).save_pretrained(folder / "teacher")
    return folder


def recipe(models: Path, cache: Path, *overrides: str) -> Config:
    """A recipe with a cache of 8 tokens; later overrides win."""
    named = [f"distill.teacher={models / 'teacher'}", f"distill.cache={cache}"]
    more = ["loss.top_k=8", "evaluation.problems=0"]
    return tiny.config(models / "student", "never-made", *METHOD, *TOP, *named, *more, *overrides)


@pytest.fixture(scope="module")
def written(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of `recipe`; do not write to it."""
    cache = tmp_path_factory.mktemp("written") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "PART_PROBLEMS", 8)
        cache_teacher(recipe(models, cache))
    return cache


@pytest.fixture
def cache(written: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage."""
    copy = tmp_path / "cache"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    yield copy


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --------------------------------------------------------------------------------- the same loss


def steps(models: Path, *overrides: str) -> Outcome:
    teacher = f"distill.teacher={models / 'teacher'}"
    overrides = (*METHOD, *TOP, teacher, "lora=null", *overrides)
    course = Course(models, "student", overrides, steps=1)
    return follow(alone(), course)


@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_full_top_k_and_cached_have_one_loss(models: Path, tmp_path: Path, prompt: str) -> None:
    """With k the whole vocabulary, whose prompt the teacher may read."""
    common, k = (f"distill.prompt={prompt}", "loss.beta=0.3"), f"loss.top_k={VOCAB + 100}"
    full = steps(models, *common, "loss.objective=full_vocabulary")
    sparse = steps(models, *common, k)
    cached = f"distill.cache={tmp_path / 'cache'}"
    cache_teacher(recipe(models, tmp_path / "cache", *common, k))
    assert_same_steps(full, sparse)
    assert_same_steps(full, steps(models, *common, k, cached))


def test_a_cache_serves_a_smaller_k_too(models: Path, written: Path) -> None:
    cached = f"distill.cache={written}"
    found = [steps(models, k, cached) for k in ("loss.top_k=8", "loss.top_k=3")]
    assert_same_steps(steps(models, "loss.top_k=3"), found[1])
    losses = [outcome.rows[0]["loss"] for outcome in found]
    assert losses[0] > 1.1 * losses[1]  # a finer partition of the vocabulary tells more


def test_the_beginning_of_a_completion(models: Path, written: Path) -> None:
    """A rank with nothing to do runs a single token."""
    overrides = (*METHOD, *TOP, f"distill.teacher={models / 'teacher'}", "loss.top_k=8")
    trainer = make_trainer(
        alone(), Course(models, "student", (*overrides, f"distill.cache={written}"))
    )
    (sample,) = trainer.trajectories.make(
        1, trainer.trajectories.requests(trainer.problems[9:10], 1)
    )
    (whole,) = trainer.method.precompute([[sample]])[0].teachers
    start = replace(sample, completion=sample.completion[:1])
    (first,) = trainer.method.precompute([[start]])[0].teachers
    assert len(whole.ids) == len(sample.completion) > 1
    assert torch.equal(first.ids, whole.ids[:1]) and torch.equal(first.logprob, whole.logprob[:1])


def test_two_teachers_each_with_a_cache_of_its_problems(models: Path, tmp_path: Path) -> None:
    lines = [
        {"question": f"{n} + 1?", "answer": f"{n + 1}", "solution": f"It is {n + 1}.", "by": by}
        for n, by in enumerate(["wide", "own", "own", "wide", "own"])
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    teachers = {
        "wide": {"teacher": str(models / "teacher"), "dtype": "float32"},
        "own": {"teacher": str(models / "student"), "dtype": "float32", "prompt": "teacher"},
    }
    cached = {name: {**of, "cache": str(tmp_path / name)} for name, of in teachers.items()}
    both = [
        f"distill={json.dumps({'teachers': chosen, 'on_policy': False})}"
        for chosen in (teachers, cached)
    ]
    data = ("data.source=file", f"data.path={tmp_path / 'p.jsonl'}", "data.columns.teacher=by")
    more = (*data, "data.train_size=null", "data.heldout_size=0", "problems_per_step=5")
    cache_teacher(recipe(models, tmp_path, *more, both[1]))
    k = "loss.top_k=8"
    assert_same_steps(steps(models, k, *more, both[0]), steps(models, k, *more, both[1]))
    sizes = [len(contents(tmp_path / name)) for name in teachers]
    assert sizes == [2, 2]
    (tmp_path / "own" / PARTS[0]).unlink()
    with pytest.raises(UserError, match="own is not whole"):
        dry_run(recipe(models, tmp_path, *more, both[1]))


# ------------------------------------------------------------------------------- written in parts


def test_what_is_written(models: Path, written: Path, capsys) -> None:
    assert [file.name for file in sorted(written.iterdir())] == [*PARTS, "teacher.json"]
    key = json.loads((written / "teacher.json").read_text())["values"]
    assert key["loss.top_k"] == 8 and key["the shared vocabulary"] == VOCAB
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(written / PARTS[2]).to_pylist()
    assert len(rows) == 4
    for row in rows:
        tokens = len(row["completion"])
        assert len(row["ids"]) == len(row["logprob"]) == 8 * tokens > 0
        values = torch.tensor(row["logprob"]).view(tokens, 8)
        assert (values.diff(dim=-1) <= 0).all() and (values < 0).all()


def test_a_kill_between_parts_leaves_the_same_bytes(
    models: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, write, made = tmp_path / "cache", TeacherCache.write, []
    left = [1]  # parts until the kill

    def counted(self: TeacherCache, number: int, *rest: object) -> None:
        if not left[0]:
            (folder / f"{PARTS[1]}.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(self, number, *rest)
        made.append(number)
        left[0] -= 1

    monkeypatch.setattr(TeacherCache, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(recipe(models, folder))
    assert made == [0]
    made.clear()
    left[0] = 10
    cache_teacher(recipe(models, folder))
    assert made == [1, 2]
    assert contents(folder) == contents(written)
    assert "part 3 of 3: 4 problems; " in capsys.readouterr().out
    cache_teacher(recipe(models, folder))  # nothing is left to do
    assert f"{folder}: 0 of 3 parts to write" in capsys.readouterr().out
    assert made == [1, 2]
    (folder / PARTS[0]).write_bytes(b"PAR1, but not for long")
    cache_teacher(recipe(models, folder))
    assert made == [1, 2, 0] and contents(folder) == contents(written)


def test_the_command(models: Path, tmp_path: Path, capsys) -> None:
    made = tiny.recipe(models / "student", tmp_path / "run")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    command = ["cache-teacher", str(tmp_path / "r.yaml")]
    assert cli.main(command) == 2
    assert "needs a recipe of method distill with distill.cache=FOLDER" in capsys.readouterr().err
    named = [f"distill.teacher={models / 'teacher'}", f"distill.cache={tmp_path / 'cache'}"]
    overrides = [*METHOD, *TOP, *named, "evaluation.problems=0", "data.train_size=4"]
    assert cli.main([*command, *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"the teacher's top 64 of 4 problems: {tmp_path / 'cache'}"
    assert cli.main([command[1], *overrides, "steps=1"]) == 0


# ------------------------------------------------------------------------------------- refused


CHANGES = {
    "temperature": (["loss.temperature=1.0"], r"loss.temperature was 1\.3 and is 1\.0"),
    "k": (["loss.top_k=9"], "loss.top_k was 8 and is 9"),
    "dtype": (["distill.dtype=bfloat16"], "distill.dtype was 'float32' and is 'bfloat16'"),
    "whose prompt": (["distill.prompt=teacher"], "distill.prompt was 'student' and is 'teacher'"),
    "template": (["prompts.student={{ problem.question }}!"], "prompts.student was '{{ problem"),
    "data": (["data.train_size=19"], r"the data is not that of .*20 \+ 6 .* now 19 \+ 6 held out"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_recipe_is_refused(models: Path, written: Path, name: str) -> None:
    """Training with it, and going on writing it."""
    overrides, words = CHANGES[name]
    changed = recipe(models, written, *overrides)
    for use in (dry_run, cache_teacher):
        with pytest.raises(UserError, match=words) as caught:
            use(changed)
        assert "is not of this recipe: " in str(caught.value) and "\n" not in str(caught.value)
        assert "set it back, or write another: distill.cache=FOLDER and python" in str(caught.value)


def test_a_smaller_k_is_refused_only_for_writing(models: Path, written: Path) -> None:
    smaller = recipe(models, written, "loss.top_k=7")
    dry_run(smaller)
    with pytest.raises(UserError, match=r"loss\.top_k was 8 and is 7"):
        cache_teacher(smaller)


def test_another_model_is_refused(models: Path, written: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"distill\.teacher was .*teacher' and is '/"):
        dry_run(recipe(models, written, f"distill.teacher={other}"))
    # The same name, and other weights.
    teacher = models / "teacher" / "model.safetensors"
    kept = teacher.read_bytes()
    try:
        model = tiny.make_model(vocab_size=270, hidden_size=48)
        with torch.no_grad():
            model.model.norm.weight[-1] += 0.01
        model.save_pretrained(models / "teacher")
        with pytest.raises(
            UserError, match=r"the digest of the teacher's weights was '\w+' and is"
        ):
            dry_run(recipe(models, written))
        teacher.unlink()  # where the files are not there, the name has to do
        dry_run(recipe(models, written))
    finally:
        teacher.write_bytes(kept)


def test_another_tokenizer_is_refused(models: Path, written: Path, tmp_path: Path) -> None:
    student = tiny.save_model(tmp_path / "student")
    tokenizer = tiny.make_tokenizer(tiny.CHAT.replace("assistant", "user"))
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(student)
    with pytest.raises(UserError, match="the digest of the tokenizer was"):
        dry_run(recipe(models, written, f"model.name_or_path={student}"))


def test_a_damaged_cache_is_refused(models: Path, cache: Path) -> None:
    (cache / PARTS[1]).unlink()
    with pytest.raises(UserError, match=r"is not whole: part-00001\.parquet is missing; finish it"):
        dry_run(recipe(models, cache))
    (cache / PARTS[1]).write_bytes((cache / PARTS[2]).read_bytes())
    with pytest.raises(UserError, match=r"part-00001\.parquet has 4 problems, not 8"):
        dry_run(recipe(models, cache))
    (cache / PARTS[1]).write_bytes((cache / PARTS[0]).read_bytes()[:-50])
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        dry_run(recipe(models, cache))
    for text, words in (
        ("{", "cannot read"),
        ('{"values": {"format": 0}, "data": {}}', "format 0"),
    ):
        (cache / "teacher.json").write_text(text)
        with pytest.raises(UserError, match=words):
            dry_run(recipe(models, cache))
    (cache / "teacher.json").unlink()
    with pytest.raises(UserError, match=r"has parts of a cache but no teacher\.json"):
        cache_teacher(recipe(models, cache))


def test_damage_that_shows_when_it_is_read(models: Path, cache: Path) -> None:
    whole = (cache / PARTS[0]).read_bytes()
    damaged = bytearray(whole)
    for position in range(40, len(whole) // 2, 7):
        damaged[position] ^= 255
    (cache / PARTS[0]).write_bytes(damaged)
    dry_run(recipe(models, cache))  # which reads the footers alone
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        steps(models, "loss.top_k=8", f"distill.cache={cache}", "problems_per_step=20")
    # A part of other problems, in a file of the right name and size.
    (cache / PARTS[0]).write_bytes((cache / PARTS[1]).read_bytes())
    with pytest.raises(UserError, match="is of another prompt or solution of problem chain_sum-"):
        steps(models, "loss.top_k=8", f"distill.cache={cache}", "problems_per_step=20")


def test_no_cache_yet(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no teacher cache in .*/none; write it: python"):
        steps(models, "loss.top_k=8", f"distill.cache={tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss={}"], "set loss.objective=top_k"),
        (["distill.on_policy=true"], "set distill.on_policy=false"),
        (["evaluation.problems=6"], "set evaluation.divergence=false"),
    ],
)
def test_what_does_not_go_with_a_cache(models: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(models, Path("c"), *overrides)


def test_a_dry_run_has_no_teacher_in_memory(models: Path, written: Path, tmp_path: Path) -> None:
    cached, local = recipe(models, written), recipe(models, written, "distill.cache=null")
    assert expected(local).keys() - expected(cached).keys() == {"teacher"}
    for phase in expected(cached).values():
        assert "the teacher's weights" not in phase.parts
    assert expected(cached)["student"].parts["the teacher's top tokens"] > 0
    assert f"is read from {written}; it is not loaded" in dry_run(cached)
    later = recipe(models, tmp_path / "later", f"distill.teacher={tmp_path / 'elsewhere'}")
    assert "later; not there yet: python -m opsd_train cache-teacher" in dry_run(later)
