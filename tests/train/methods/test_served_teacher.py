"""A teacher behind vLLM servers, here of the same tiny model in a thread."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from opsd_train.cache_teacher import cache_teacher
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.dry_run.plan import dry_run, expected
from tests.helpers import tiny
from tests.helpers.pair import alone
from tests.helpers.steps import Course, Outcome, assert_same_steps, follow, make_trainer
from tests.helpers.vllm_double import Predictions, VllmDouble

VOCAB = 261
METHOD = (
    *("method=distill", "distill.on_policy=false", "distill.dtype=float32"),
    "loss.objective=top_k",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a wider teacher."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "student")
    tiny.save_model(folder / "teacher")
    tiny.make_model(hidden_size=48).save_pretrained(folder / "teacher")
    return folder


Serve = Callable[..., VllmDouble]


@pytest.fixture
def serve(models: Path) -> Iterator[Serve]:
    """Starts a server of the teacher."""
    started: list[VllmDouble] = []

    def start(**options: object) -> VllmDouble:
        model = tiny.make_model(hidden_size=48)
        given = {"weights": "/elsewhere/teacher", "predict": Predictions(model), **options}
        started.append(VllmDouble(**given))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def overrides(models: Path, *more: str) -> tuple[str, ...]:
    return (*METHOD, f"distill.teacher={models / 'teacher'}", "lora=null", *more)


def steps(models: Path, *more: str) -> Outcome:
    return follow(alone(), Course(models, "student", overrides(models, *more), steps=1))


def recipe(models: Path, *more: str) -> Config:
    return tiny.config(models / "student", "never-made", *overrides(models, *more))


def urls(*servers: VllmDouble) -> str:
    return f"distill.servers=[{','.join(server.url for server in servers)}]"


@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_local_cached_and_served_have_one_loss(
    models: Path, serve: Serve, tmp_path: Path, prompt: str
) -> None:
    """With k the whole vocabulary, whichever prompt the teacher reads."""
    common = (f"distill.prompt={prompt}", "loss.beta=0.3", f"loss.top_k={VOCAB}")
    full = steps(models, *common[:2], "loss.objective=full_vocabulary")
    cache = (f"distill.cache={tmp_path / 'cache'}", "evaluation.problems=0")
    cache_teacher(recipe(models, *common, *cache))
    one, two = serve(), serve()
    assert_same_steps(full, steps(models, *common))
    assert_same_steps(full, steps(models, *common, *cache))
    assert_same_steps(full, steps(models, *common, urls(one, two)))
    assert len(one.bodies) > 1 and len(two.bodies) > 1  # the first is the check at the start


def test_less_than_the_vocabulary(models: Path, serve: Serve) -> None:
    """The token that stands there, which a server adds, is not one of the k."""
    common = ("loss.beta=0.5", "loss.top_k=5")
    assert_same_steps(steps(models, *common), steps(models, *common, urls(serve())))


def test_the_servers_are_asked_for_what_the_student_wrote(models: Path, serve: Serve) -> None:
    server = serve()
    course = Course(models, "student", overrides(models, urls(server), "distill.on_policy=true"))
    trainer = make_trainer(alone(), course)
    samples = trainer.trajectories.make(1, trainer.trajectories.requests(trainer.problems[:2], 1))
    server.bodies.clear()
    (top,) = trainer.method.precompute([samples])[0].teachers
    asked = sorted(body["prompt"] for body in server.bodies)
    assert asked == sorted([*s.student_prompt, *s.completion] for s in samples)
    assert top.ids.shape == (sum(len(s.completion) for s in samples), 64)
    assert (top.logprob.diff(dim=-1) <= 0).all()


def test_a_server_that_is_gone(
    models: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = serve(), serve()
    course = Course(models, "student", overrides(models, urls(one, two)))
    trainer = make_trainer(alone(), course)
    samples = trainer.trajectories.make(1, trainer.trajectories.requests(trainer.problems[:3], 1))
    (before,) = trainer.method.precompute([samples])[0].teachers
    two.kill()
    (after,) = trainer.method.precompute([samples])[0].teachers
    assert torch.equal(before.ids, after.ids) and torch.equal(before.logprob, after.logprob)
    assert f"{two.url} is gone: connection refused" in capsys.readouterr().out
    one.kill()
    begun = time.monotonic()
    with pytest.raises(UserError, match="no vLLM server is left"):
        trainer.method.precompute([samples])
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "/m/another"}, "serves /m/another, and distill.teacher is .*teacher: name"),
        ({"max_logprobs": 20}, "gives no 64 log-probabilities .*--max-logprobs 64, or lower"),
    ],
    ids=["model", "logprobs"],
)
def test_a_server_that_does_not_fit(
    models: Path, serve: Serve, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(alone(), Course(models, "student", overrides(models, urls(serve(**options)))))


def test_no_server(models: Path) -> None:
    gone = "distill.servers=[http://127.0.0.1:9]"
    with pytest.raises(UserError, match=r"does not answer \(connection refused\); start it there"):
        make_trainer(alone(), Course(models, "student", overrides(models, gone)))


def test_a_teacher_with_more_tokens(models: Path, serve: Serve) -> None:
    wider = Predictions(tiny.make_model(vocab_size=270, hidden_size=48))
    server = serve(predict=wider)
    teacher = models / "wide" / "teacher"
    tiny.save_model(teacher)
    tiny.make_model(vocab_size=270, hidden_size=48).save_pretrained(teacher)
    more = (f"distill.teacher={teacher}", "loss.top_k=270", urls(server))
    trainer = make_trainer(alone(), Course(models, "student", overrides(models, *more)))
    samples = trainer.trajectories.make(1, trainer.trajectories.requests(trainer.problems[:1], 1))
    with pytest.raises(UserError, match="the served teacher predicts token 269"):
        trainer.method.precompute([samples])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["loss.objective=full_vocabulary"], "set loss.objective=top_k"),
        (["loss.temperature=0.9"], "set loss.temperature=1"),
        (["distill.cache=c"], "distill.cache and distill.servers: set one of them"),
        (["distill.servers=[localhost:80]"], "is not of the form http://host:8000"),
        (["distill.servers=[http://a:1,http://a:1]"], "names a server twice"),
    ],
    ids=["objective", "temperature", "cache", "url", "twice"],
)
def test_refused(models: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(models, "distill.servers=[http://a:1]", *more)


def test_dry_run(models: Path) -> None:
    served = recipe(models, "distill.servers=[http://a:1]")
    assert "is asked on http://a:1; it is not loaded" in dry_run(served)
    local = recipe(models)
    assert expected(local)["student"].total > expected(served)["student"].total
