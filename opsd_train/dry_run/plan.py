"""What a run would do, from shapes alone: the resolved config, the loss's plan, the memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opsd_kernels import plan
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config, GrpoConfig, LoraConfig, ModelConfig, OpsdConfig
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.problems import Problem, load_problems
from opsd_train.data.prompts import Measured, PromptBuilder
from opsd_train.distributed.context import resolve_device
from opsd_train.dry_run.memory import Generation, Phase, Setup, Sizes, Work, predict, sizes_of
from opsd_train.methods import METHODS
from opsd_train.methods.common import workspace_bytes
from opsd_train.model.adapters import add_adapters
from opsd_train.model.policy import (
    attention,
    load_model_config,
    load_tokenizer,
)
from opsd_train.rollout.context_checks import check_batch_tokens, check_context, heldout_texts

_MIB = 2**20


def dry_run(config: Config, shard: str = "full") -> str:
    """Check the recipe, its data and prompts; describe the loss's plan and the memory expected.

    No weights are loaded and nothing is written. Under torchrun, memory is that of one process.
    """
    work, problems, longest = _work(config)
    setup, sizes = _setup(config, shard)
    options = {"grad_weight": sizes.rank == 0, **setup.loss}
    loss_plan = plan(work.loss_tokens, sizes.hidden, sizes.vocab, **options)
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"{problems} problems; longest prompt {longest} tokens; micro-batches of up to "
            f"{max(work.tokens, work.teacher_tokens)} tokens; {sizes.trained:,} trained parameters",
            f"loss plan: {loss_plan}",
            *_memory(sizes, work, setup),
            *_vllm(config),
        ]
    )


def expected(config: Config, shard: str = "full") -> dict[str, Phase]:
    """The peak of each phase of this recipe's steps."""
    setup, sizes = _setup(config, shard)
    return predict(sizes, _work(config)[0], setup)


def _memory(sizes: Sizes, work: Work, setup: Setup) -> list[str]:
    unknown = sizes.unknown or (setup.teacher.unknown if setup.teacher else ())
    if unknown:
        return [f"memory: not predicted, which takes layers like Llama's, not {', '.join(unknown)}"]
    place = f"memory expected on {setup.loss['device']}, beside Python and the libraries:"
    return [place, *_table(predict(sizes, work, setup))]


def _table(phases: dict[str, Phase]) -> list[str]:
    most = max(phase.total for phase in phases.values())
    lines = []
    for name, phase in phases.items():
        mark = "  <- the most" if phase.total == most else ""
        lines.append(f"  {name:44}{phase.total / _MIB:10,.0f} MiB{mark}")
        for part, size in phase.parts.items():
            if size:
                lines.append(f"    {part:42}{size / _MIB:10,.0f}")
    return lines


def _vllm(config: Config) -> list[str]:
    if config.rollout.engine != "vllm":
        return []
    share = f"{config.rollout.vllm_memory:.0%}"
    return [f"  while it generates, vLLM takes {share} of the device beside that"]


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _work(config: Config) -> tuple[Work, int, int]:
    """The largest step that can come, the number of problems, the longest prompt's tokens."""
    kind, (train, heldout) = METHODS[config.method], load_problems(config.data)
    builder = PromptBuilder(load_tokenizer(config.model), config.prompts)
    measured = builder.measure(train, kind.required_texts(config))
    asked = builder.measure(heldout[: config.evaluation.problems], heldout_texts(config))
    check_context(config, _model_configs(config), measured, asked)
    source, rollout = kind.source(config), config.rollout
    each = 1 if source == "solution" else rollout.samples_per_prompt
    count = -(-config.problems_per_step // _processes())
    largest = [_sample(builder, problem, config) for problem in _longest(config, measured, count)]
    step = [sample for sample in largest for _ in range(each)]
    groups = list(micro_batches(step, config.micro_batch_tokens))
    ours = rollout.engine == "transformers"
    generates = ours and source != "solution"
    lengths = [len(getattr(s, f"{source}_prompt")) for s in step] if generates else []
    work = Work(
        tokens=max(_padded(group, "student_prompt") for group in groups),
        teacher_tokens=max(
            _padded(group, "teacher_prompt" if kind.teacher_prompt else "student_prompt")
            for group in groups
        ),
        longest=step[-1].longest,
        loss_tokens=max(sum(len(s.completion) for s in group) for group in groups),
        all_loss_tokens=sum(len(s.completion) for s in step),
        rollout=_batch(lengths, rollout.max_new_tokens, config) if generates else None,
        evaluation=_evaluation(config, asked) if ours else None,
    )
    prompts = [side for side in measured.tokens if side != "solution"]
    return work, len(measured.problems), max(max(measured.tokens[side]) for side in prompts)


def _model_configs(config: Config) -> dict[str, Any]:
    """Of the models that read the completions."""
    found = {"model": load_model_config(config.model)}
    if config.distill is not None:
        teacher = replace(config.model, name_or_path=config.distill.teacher)
        found["teacher"] = load_model_config(teacher)
    return found


def _longest(config: Config, measured: Measured, count: int) -> list[Problem]:
    """The `count` problems with the longest sequences, the longest last."""
    prompts = [tokens for side, tokens in measured.tokens.items() if side != "solution"]
    longest = list(map(max, zip(*prompts, prompts[0], strict=True)))
    if "solution" in measured.tokens:
        longest = list(map(sum, zip(longest, measured.tokens["solution"], strict=True)))
    order = sorted(range(len(longest)), key=longest.__getitem__)
    return [measured.problems[index] for index in order[-count:]]


def _batch(prompts: list[int], new: int, config: Config) -> Generation:
    """The largest batch, of the longest of these prompts' lengths."""
    longest, budget = max(prompts), config.rollout.batch_tokens
    check_batch_tokens("rollout.batch_tokens", budget, longest, new)
    return Generation(min(len(prompts), budget // (longest + new)), longest, new)


def _evaluation(config: Config, asked: Measured) -> Generation | None:
    if not asked.problems:
        return None
    side = "teacher" if config.evaluation.teacher else "student"
    share = -(-len(asked.problems) // _processes())
    return _batch(sorted(asked.tokens[side])[-share:], config.evaluation.max_new_tokens, config)


def _sample(builder: PromptBuilder, problem: Problem, config: Config) -> Sample:
    kind = METHODS[config.method]
    reference = kind.source(config) == "solution"
    teacher = builder.teacher(problem) if kind.teacher_prompt else None
    made = builder.solution(problem) if reference else [0] * config.rollout.max_new_tokens
    return Sample(problem, builder.student(problem), teacher, made)


def _padded(group: Sequence[Sample], prompt: str) -> int:
    return len(group) * max(len(getattr(s, prompt)) + len(s.completion) for s in group)


def _setup(config: Config, shard: str) -> tuple[Setup, Sizes]:
    """How the recipe computes, with what model."""
    dtype, device = getattr(torch, config.model.dtype), resolve_device(config.model.device)
    sizes = _sizes(config.model, config.lora)
    stored = load_model_config(config.model).dtype or torch.float32
    processes, full = _processes(), config.lora is None
    setup = Setup(
        itemsize=dtype.itemsize,
        file_itemsize=stored.itemsize,
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
    if config.method == "opsd":
        teacher = (config.opsd or OpsdConfig()).teacher
        copied = teacher == "ema" or (teacher == "initial" and full)
        changes = {"teacher": sizes, "keeps_states": True, "copied": copied}
    elif config.method == "distill":
        model = replace(config.model, name_or_path=config.distill.teacher)
        item = getattr(torch, config.distill.dtype).itemsize
        changes = {"teacher": _sizes(model, None), "teacher_itemsize": item, "keeps_states": True}
    else:
        grpo = config.grpo or GrpoConfig()
        older = config.method == "grpo" and (grpo.kl_weight > 0 or grpo.updates > 1)
        changes: dict[str, Any] = {"teacher": sizes if older else None}
        changes["copied"] = older and grpo.kl_weight > 0 and full
    return replace(setup, **changes), sizes


def _heads(config: Config) -> int:
    """Heads whose logits the loss holds at a time."""
    both = METHODS[config.method].divergence and config.loss.objective == "full_vocabulary"
    return 2 if both else 1


def _sizes(model: ModelConfig, lora: LoraConfig | None) -> Sizes:
    text: Any = load_model_config(model).get_text_config()
    with torch.device("meta"):
        core = AutoModelForCausalLM.from_config(text, attn_implementation=attention(model))
        adapted = core if lora is None else add_adapters(core, lora)
    rank = lora.rank if lora else 0
    return sizes_of(adapted, text, rank, eager=core.config._attn_implementation == "eager")
