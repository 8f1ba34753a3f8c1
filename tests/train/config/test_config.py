"""Recipes and overrides give a checked Config, or an error of one line."""

import copy
import dataclasses

import pytest
import yaml

from opsd_train.config.errors import FOREIGN_KEYS, UserError
from opsd_train.config.load import (
    RECIPES,
    config_from,
    known_keys,
    load_recipe,
    merge,
    recipe_description,
    recipe_names,
    to_yaml,
)

RECIPE = {
    "output_dir": "runs/test",
    "steps": 4,
    "problems_per_step": 2,
    "micro_batch_tokens": 64,
    "model": {"name_or_path": "tiny"},
    "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]},
    "data": {
        "source": "reasoning_gym",
        "task": "chain_sum",
        "task_config": {"min_terms": 2},
        "train_size": 8,
        "heldout_size": 4,
    },
    "prompts": {
        "student": "{{ problem.question }}",
        "teacher": "{{ problem.question }}\n{{ problem.solution }}\n",
        "max_prompt_tokens": 32,
    },
    "rollout": {"max_new_tokens": 4, "batch_tokens": 128},
    "optim": {"lr": 0.001},
    "evaluation": {"problems": 4, "max_new_tokens": 4},
}


def test_sections_and_defaults():
    config = config_from(RECIPE)
    assert config.lora.alpha == 4.0 and isinstance(config.lora.alpha, float)
    assert config.loss.beta == 0.5
    assert config.rollout.temperature == 1.0
    assert config.data.columns.question == "question"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr=1E+1", "optim", "lr", 10.0),
        ("optim.lr=2", "optim", "lr", 2.0),
        ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("data.task_config={max_terms: 3}", "data", "task_config", {"max_terms": 3}),
        ("prompts.student='{{ problem.question }} ='", "prompts", "student", None),
        ("prompts.student_thinking=true", "prompts", "student_thinking", True),
        ("loss.token_clip=0.05", "loss", "token_clip", 0.05),
        ("data.columns.solution=null", "data", "columns", None),
    ],
)
def test_overrides(override, section, key, value):
    got = getattr(getattr(config_from(RECIPE, [override]), section), key)
    if key == "student":
        assert got == "{{ problem.question }} ="
    elif key == "columns":
        assert got.solution is None
    else:
        assert got == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ problem.question }}: think # aloud", "{{ problem.question }}: think # aloud"),
        ("{% if x %}a: [b{% endif %}", "{% if x %}a: [b{% endif %}"),
        ("'{{ problem.question }} ='", "{{ problem.question }} ="),
        (r'"two\nlines"', "two\nlines"),
        ('"a" or "b"', '"a" or "b"'),
        ("it's", "it's"),
        ("7", "7"),
        ("true", "true"),
        ("null", "null"),
        ("", ""),
    ],
)
def test_text_needs_no_quotes(text, value):
    assert config_from(RECIPE, [f"prompts.student={text}"]).prompts.student == value


def test_text_may_be_null_where_that_means_something():
    assert config_from(RECIPE, ["prompts.system=null"]).prompts.system is None
    assert config_from(RECIPE, ["prompts.system='null'"]).prompts.system == "null"
    assert config_from(RECIPE, ["model.name_or_path=2025"]).model.name_or_path == "2025"
    assert config_from(RECIPE, ["data.columns.answer=1"]).data.columns.answer == "1"


def test_names_of_other_trainers_are_suggested_for_keys_that_exist():
    assert set(FOREIGN_KEYS.values()) <= set(known_keys())


def test_an_override_may_reach_into_a_free_form_value_and_the_last_one_wins():
    overrides = ["data.task_config.max_terms=3", "steps=5", "steps=6"]
    config = config_from(RECIPE, overrides)
    assert config.data.task_config == {"min_terms": 2, "max_terms": 3}
    assert config.steps == 6
    assert RECIPE["data"]["task_config"] == {"min_terms": 2}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ("lr=1", ["unknown key lr", "optim.lr"]),
        ("rolout.top_k=3", ["unknown key rolout", "did you mean rollout"]),
        ("data.columns.qestion=q", ["unknown key data.columns.qestion", "data.columns.question"]),
        ("optim.lr=fast", ["optim.lr", "valid number", "'fast'"]),
        ("optim.lr='3'", ["optim.lr", "valid number", "'3'"]),
        ("steps=3.5", ["steps", "valid integer", "3.5"]),
        ("steps=true", ["steps", "valid integer", "True"]),
        ("steps=", ["steps", "valid integer", "None"]),
        ("model.dtype=float16", ["model.dtype", "'bfloat16' or 'float32'", "'float16'"]),
        ("optim=3", ["optim", "section", "3"]),
        ("steps.more=3", ["steps.more", "steps is a value"]),
        ("steps=0", ["steps", "greater than 0"]),
        ("lora.rank=-1", ["lora.rank", "greater than 0"]),
        ("loss.beta=1.5", ["loss.beta", "less than or equal to 1"]),
        ("loss.beta=.nan", ["loss.beta", "finite"]),
        ("rollout.temperature=0", ["rollout.temperature", "greater than 0"]),
        ("rollout.top_p=0", ["rollout.top_p", "greater than 0"]),
        ("rollout.top_p=1.1", ["rollout.top_p", "less than or equal to 1"]),
        ("lora.target_modules=[]", ["lora.target_modules", "at least 1"]),
        ("data.source=file", ["data.source=file needs data.path"]),
        ("data.task=null", ["needs data.task"]),
        ("data.balance_over=['1', '2', '3']", ["data.train_size=8", "multiple of the 3"]),
        ("data.balance_over=['1', '1']", ["names an answer twice"]),
        ("evaluation.problems=5", ["evaluation.problems=5", "data.heldout_size=4"]),
        ("optim.warmup_steps=5", ["optim.warmup_steps=5", "steps=4"]),
        ("steps", ["key=value", "'steps'"]),
        ("=3", ["key=value"]),
        ("learning_rate=1", ["unknown key learning_rate", "did you mean optim.lr?"]),
        ("optim.warmup_ratio=1", ["unknown key optim.warmup_ratio", "optim.warmup_steps"]),
        ("num_generations=8", ["unknown key num_gen", "did you mean rollout.samples_per_prompt?"]),
        ("watch.width=3", ["unknown key watch", "since version 0.2 it is collapse"]),
        ("lora.r=8", ["unknown key lora.r", "did you mean lora.rank?"]),
        ("optim.lr=[1", ["optim.lr", "quote it"]),
    ],
)
def test_bad_overrides_are_one_line(override, words):
    with pytest.raises(UserError) as error:
        config_from(RECIPE, [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_clip_needs_the_full_vocabulary():
    overrides = ["loss.objective=sampled_token", "loss.token_clip=0.1"]
    with pytest.raises(UserError, match="token_clip works with"):
        config_from(RECIPE, overrides)


def test_an_unknown_key_goes_before_the_missing_one_it_causes():
    recipe = copy.deepcopy(RECIPE)
    recipe["optim"] = {"ir": 0.1}
    with pytest.raises(UserError, match=r"unknown key optim.ir.*optim.lr.*1 more"):
        config_from(recipe)
    recipe["optim"] = {}
    with pytest.raises(UserError, match=r"missing key optim.lr"):
        config_from(recipe)


def test_to_yaml_gives_the_same_config_again(tmp_path):
    config = config_from(RECIPE, ["optim.lr=3e-5"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert config_from(load_recipe(str(file))) == config
    assert "teacher: |" in file.read_text()


def test_every_key_has_a_description():
    keys = known_keys()
    assert all(keys.values())
    assert {"steps", "optim.lr", "data.columns.solution"} <= set(keys)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package(name):
    config = config_from(load_recipe(name))
    assert config.output_dir == "runs/" + name.replace("/", "-")
    assert len(recipe_description(name)) > 20


def test_a_recipe_may_lie_over_another(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: demo/opsd\nsteps: 7\noptim: {lr: 1e-5}\n")
    recipe, base = load_recipe(str(file)), load_recipe("demo/opsd")
    assert recipe["steps"] == 7
    assert recipe["optim"] == base["optim"] | {"lr": 1e-5}
    assert recipe["output_dir"] == "runs/mine"
    assert recipe["model"] == base["model"]


def test_merge_replaces_what_is_inside_a_section_as_a_whole():
    merged = merge({"data": {"task": "a", "task_config": {"x": 1}}}, {"data": {"task_config": {}}})
    assert merged == {"data": {"task": "a", "task_config": {}}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "no keys"),
        ("", "no keys"),
        ("base: demo/ospd\n", "did you mean demo/opsd"),
    ],
)
def test_bad_recipe_files(tmp_path, text, reason):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_recipe(str(file))


def test_unknown_recipes():
    with pytest.raises(UserError, match=r"no recipe file nowhere\.yaml"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match=r"unknown recipe 'demo/ospd'; did you mean demo/opsd"):
        load_recipe("demo/ospd")


def test_recipes_hold_no_key_twice():
    """YAML silently keeps the last of two equal keys."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for name in recipe_names():
        yaml.load((RECIPES / f"{name}.yaml").read_text(), Loader)
