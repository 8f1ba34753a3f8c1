"""--dry-run: the resolved config, the loss plan and the expected memory, from shapes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opsd_kernels import plan
from opsd_train.config.load import to_yaml
from opsd_train.config.method_schema import GrpoConfig, OpsdConfig, TeacherConfig
from opsd_train.config.schema import Config, LoraConfig, ModelConfig
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.fingerprint import Fingerprint, fingerprint
from opsd_train.data.layout import PADDED
from opsd_train.data.problems import Problem, load_problems
from opsd_train.data.prompts import Measured, PromptBuilder
from opsd_train.data.teacher_cache import WRITE, TeacherCache
from opsd_train.distributed.context import resolve_device
from opsd_train.dry_run.memory import (
    GenerationBatch,
    LargestStep,
    OtherTeacher,
    PhaseMemory,
    Setup,
    Sizes,
    predict,
    sizes_of,
)
from opsd_train.methods import METHODS
from opsd_train.methods.common import workspace_bytes
from opsd_train.methods.teachers import open_cache, problems_of, refuse_unknown_teachers
from opsd_train.model.adapters import add_adapters
from opsd_train.model.families import shared_layout
from opsd_train.model.policy import PACKAGED, attention, load_model_config, load_tokenizer
from opsd_train.rollout.context_checks import check_batch_tokens, check_context, heldout_texts

_MIB = 2**20


def dry_run(config: Config, shard: str = "full") -> str:
    """Check the recipe, its data and prompts; return the text that --dry-run prints.

    No weights are loaded and nothing is written. Under torchrun the memory is that of one process.
    Raises UserError for a recipe that cannot be run.
    """
    step, problems, longest = _largest_step(config)
    setup, sizes = _setup(config, shard)
    options = {"grad_weight": sizes.rank == 0, **setup.loss}
    loss_plan = plan(step.loss_tokens, sizes.hidden, sizes.vocab, **options)
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"{problems} problems; longest prompt {longest} tokens; micro-batches of up to "
            f"{max(step.tokens, step.teacher_tokens)} tokens; {sizes.trained:,} trained parameters",
            f"loss plan: {loss_plan}",
            *_memory(sizes, step, setup),
            *_engine(config),
            *_elsewhere(config),
        ]
    )


def expected(config: Config, shard: str = "full") -> dict[str, PhaseMemory]:
    """The expected peak memory of each phase of the recipe's run."""
    setup, sizes = _setup(config, shard)
    return predict(sizes, _largest_step(config)[0], setup)


def _memory(sizes: Sizes, step: LargestStep, setup: Setup) -> list[str]:
    unknown = next(filter(None, [x.unknown for x in (sizes, *(o.sizes for o in setup.others))]), ())
    if unknown:
        return [f"memory: not predicted; only layers like Llama's are, not {', '.join(unknown)}"]
    heading = f"memory expected on {setup.loss['device']}, without Python and the libraries:"
    return [heading, *_table(predict(sizes, step, setup))]


def _table(phases: dict[str, PhaseMemory]) -> list[str]:
    most = max(phase.total for phase in phases.values())
    lines = []
    for name, phase in phases.items():
        mark = "  <- the most" if phase.total == most else ""
        lines.append(f"  {name:44}{phase.total / _MIB:10,.0f} MiB{mark}")
        for part, size in phase.parts.items():
            if size:
                lines.append(f"    {part:42}{size / _MIB:10,.0f}")
    return lines


def _engine(config: Config) -> list[str]:
    """Where vLLM generates."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        return [f"  vLLM takes another {rollout.vllm_memory:.0%} of the device while it generates"]
    if rollout.engine == "vllm-server":
        when = ", a step ahead" if rollout.ahead else ""
        return [f"rollouts: on {', '.join(rollout.servers)}{when}; they take no memory here"]
    return []


def _elsewhere(config: Config) -> list[str]:
    """Where the teachers are that are not in memory."""
    served = [
        f"the teacher {teacher.teacher} is asked on {', '.join(teacher.servers)}; it is not loaded"
        for teacher in _teachers(config).values()
        if teacher.servers
    ]
    return served + [
        f"the teacher {teacher.teacher} is read from {teacher.cache}; "
        + ("it is not loaded" if _is_there(teacher.cache) else f"not there yet: {WRITE}")
        for teacher in _teachers(config).values()
        if teacher.cache is not None
    ]


def _is_there(cache: str | None) -> bool:
    """Whether this folder has a teacher's cache, or the beginning of one."""
    return cache is not None and TeacherCache(Path(cache), ()).exists


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _largest_step(config: Config) -> tuple[LargestStep, int, int]:
    """The largest possible step, the number of problems, the tokens of the longest prompt."""
    method, (train, heldout) = METHODS[config.method], load_problems(config.data)
    refuse_unknown_teachers(config, [*train, *heldout])
    builder = PromptBuilder(load_tokenizer(config.model), config.prompts)
    train_lengths = builder.measure(train, method.required_texts(config))
    _check_caches(config, builder.tokenizer, train_lengths.problems, fingerprint(train, heldout))
    heldout = heldout[: config.evaluation.problems]
    heldout_lengths = builder.measure(heldout, heldout_texts(config))
    model_config = load_model_config(config.model)
    check_context(config, model_config, _teacher_configs(config), train_lengths, heldout_lengths)

    source, rollout = method.source(config), config.rollout
    samples_per_problem = 1 if source == "solution" else rollout.samples_per_prompt
    count = -(-config.problems_per_step // _processes())
    largest = [_sample(builder, problem, config) for problem in _longest(train_lengths, count)]
    samples = [sample for sample in largest for _ in range(samples_per_problem)]
    layout = shared_layout(_core(config.model)) or PADDED
    groups = list(micro_batches(samples, config.micro_batch_tokens, layout))
    own_engine = rollout.engine == "transformers"  # vLLM has memory of its own
    generates = own_engine and source != "solution"
    lengths = [len(getattr(s, f"{source}_prompt")) for s in samples] if generates else []
    its_own = method.teacher_prompt(config)
    sides = ("student_prompt", "teacher_prompt" if its_own else "student_prompt")
    student, teacher = ([_read(group, side) for group in groups] for side in sides)
    step = LargestStep(
        tokens=max(layout.tokens(*texts) for texts in student),
        teacher_tokens=max(layout.tokens(*texts) for texts in teacher),
        longest=max(max(layout.lengths(*texts)) for texts in [*student, *teacher]),
        loss_tokens=max(sum(len(s.completion) for s in group) for group in groups),
        all_loss_tokens=sum(len(s.completion) for s in samples),
        rollout=_batch(lengths, rollout.max_new_tokens, config) if generates else None,
        evaluation=_evaluation(config, heldout_lengths) if own_engine else None,
    )
    prompts = [tokens for side, tokens in train_lengths.tokens.items() if side != "solution"]
    return step, len(train_lengths.problems), max(map(max, prompts))


def _check_caches(
    config: Config, tokenizer: Any, problems: Sequence[Problem], data: Fingerprint
) -> None:
    """Raises UserError if a teacher's cache is there, but not whole or not of this recipe."""
    rows = load_model_config(config.model).get_text_config().vocab_size
    for name, teacher in _teachers(config).items():
        if _is_there(teacher.cache):
            open_cache(config, teacher, tokenizer, problems_of(name, problems), data, rows)


def _teacher_configs(config: Config) -> dict[str | None, Any]:
    """The transformers configurations of other models in memory, by the teacher's name."""
    return {
        name: load_model_config(_teacher_model(config, teacher))
        for name, teacher in _teachers(config).items()
        if teacher.in_memory
    }


def _teachers(config: Config) -> dict[str | None, TeacherConfig]:
    return config.distill.by_name() if config.distill else {}


def _teacher_model(config: Config, teacher: TeacherConfig) -> ModelConfig:
    # mypy does not see that the sections of a recipe are dataclasses.
    return replace(cast(Any, config.model), name_or_path=teacher.teacher)


def _longest(train: Measured, count: int) -> list[Problem]:
    """The `count` problems with the longest sequences, in rising order."""
    prompts = [tokens for side, tokens in train.tokens.items() if side != "solution"]
    longest = list(map(max, zip(*prompts, prompts[0], strict=True)))
    if "solution" in train.tokens:
        longest = list(map(sum, zip(longest, train.tokens["solution"], strict=True)))
    order = sorted(range(len(longest)), key=longest.__getitem__)
    return [train.problems[index] for index in order[-count:]]


def _batch(prompts: list[int], new: int, config: Config) -> GenerationBatch:
    """The largest batch for prompts of these lengths, at the longest of them."""
    longest, budget = max(prompts), config.rollout.batch_tokens
    check_batch_tokens("rollout.batch_tokens", budget, longest, new)
    return GenerationBatch(min(len(prompts), budget // (longest + new)), longest, new)


def _evaluation(config: Config, heldout: Measured) -> GenerationBatch | None:
    if not heldout.problems:
        return None
    side = "teacher" if config.evaluation.teacher else "student"
    share = -(-len(heldout.problems) // _processes())
    return _batch(sorted(heldout.tokens[side])[-share:], config.evaluation.max_new_tokens, config)


def _sample(builder: PromptBuilder, problem: Problem, config: Config) -> Sample:
    """A sample of this problem with the longest completion possible."""
    method = METHODS[config.method]
    on_solution = method.source(config) == "solution"
    teacher = builder.teacher(problem) if method.teacher_prompt(config) else None
    new = builder.solution(problem) if on_solution else [0] * config.rollout.max_new_tokens
    return Sample(problem, builder.student(problem), teacher, new)


def _read(group: Sequence[Sample], prompt: str) -> tuple[list[list[int]], list[list[int]]]:
    """A micro-batch's prompts of this name, and completions."""
    return [getattr(s, prompt) for s in group], [s.completion for s in group]


def _setup(config: Config, shard: str) -> tuple[Setup, Sizes]:
    """Dtypes, sharding and teacher of the recipe's run, and the trained model's sizes."""
    dtype, device = getattr(torch, config.model.dtype), resolve_device(config.model.device)
    sizes = _sizes(config.model, config.lora)
    stored = load_model_config(config.model).dtype or torch.float32
    processes, full = _processes(), config.lora is None
    whole_file = processes == 1 or config.model.name_or_path == PACKAGED
    setup = Setup(
        itemsize=dtype.itemsize,
        file_itemsize=stored.itemsize if whole_file else 0,
        checkpointing=config.model.gradient_checkpointing,
        loss={
            "loss": "divergence" if _heads(config) == 2 else "logprob",
            "dtype": dtype,
            "device": device,
            "two_passes": 0 < config.loss.beta < 1 or config.loss.token_clip is not None,
            "workspace_bytes": workspace_bytes(device, trained=full),
        },
        shards=processes if shard == "full" else 1,
        processes=processes,
    )
    return replace(setup, **_teacher_setup(config, sizes), top_k=_top_k(config, sizes)), sizes


def _top_k(config: Config, sizes: Sizes) -> int:
    """How many of the teacher's tokens are kept at each completion token; 0: its hidden states."""
    return min(config.loss.top_k, sizes.vocab) if config.loss.objective == "top_k" else 0


def _teacher_setup(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The fields of Setup about the models that `precompute` runs; `sizes` are the policy's."""
    full, keeps_states = config.lora is None, config.loss.objective != "top_k"
    if config.method == "opsd":
        weights = (config.opsd or OpsdConfig()).teacher
        copied = weights == "ema" or (weights == "initial" and full)
        return {"teacher": sizes, "keeps_states": keeps_states, "copied": copied}
    if config.distill is not None:
        others = [
            OtherTeacher(
                _sizes(_teacher_model(config, teacher), None),
                getattr(torch, teacher.dtype).itemsize,
            )
            for teacher in _teachers(config).values()
            if teacher.in_memory
        ]
        return {"others": tuple(others), "keeps_states": keeps_states}
    if config.method == "grpo":
        grpo = config.grpo or GrpoConfig()
        kl = grpo.kl_weight > 0
        return {"teacher": sizes if kl or grpo.updates > 1 else None, "copied": kl and full}
    return {}


def _heads(config: Config) -> int:
    """Heads whose logits the loss holds at the same time."""
    both = METHODS[config.method].divergence and config.loss.objective == "full_vocabulary"
    return 2 if both else 1


def _sizes(model: ModelConfig, lora: LoraConfig | None) -> Sizes:
    core = _core(model)
    with torch.device("meta"):
        adapted = core if lora is None else add_adapters(core, lora)
    rank, eager = lora.rank if lora else 0, core.config._attn_implementation == "eager"
    return sizes_of(adapted, core.config.get_text_config(), rank, eager)


def _core(model: ModelConfig) -> PreTrainedModel:
    """The model without values of its weights."""
    text: Any = load_model_config(model).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text, attn_implementation=attention(model))
