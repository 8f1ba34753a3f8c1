"""Trainer classes of TRL's whose losses run on hidden states."""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, nn

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.integrations.bypass import hidden_as_logits, replaced
from opsd_kernels.integrations.heads import LmHead
from opsd_kernels.integrations.trl import head_input
from opsd_kernels.integrations.trl.head_input import HeadInput, pair_arguments
from opsd_kernels.integrations.trl.lookups import use_fused_losses
from opsd_kernels.integrations.trl.version import check_version

TrainerClass = TypeVar("TrainerClass", bound=type)


def fused(trainer: TrainerClass) -> TrainerClass:
    """A subclass of a TRL trainer that computes its losses without the logits.

    Losses, gradients and logged metrics are those of the trainer. For SFTTrainer, GRPOTrainer,
    RLOOTrainer, DistillationTrainer, SDFTTrainer, SDPOTrainer, GKDTrainer, GOLDTrainer, and
    subclasses of these. Evaluation with `compute_metrics` needs logits and is left as it is.

    Raises:
        ImportError: if the installed TRL is not one of KNOWN_VERSIONS.
        TypeError: for another class.
        ValueError: by the trainer's constructor, for an option that has no fused loss; by a step,
            for a model whose head is not supported.
    """
    check_version()
    for base in trainer.__mro__:
        mixin = _MIXINS.get(f"{base.__module__}.{base.__qualname__}")
        if mixin is not None:
            return type(f"Fused{trainer.__name__}", (mixin, trainer), {})  # type: ignore[return-value]
    names = ", ".join(sorted(name.rpartition(".")[2] for name in _MIXINS))
    raise TypeError(f"trainer: expected one of TRL's {names} or a subclass, got {trainer.__name__}")


class _FusedLookups:
    """Trainers that take hidden states to a function of TRL's."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with use_fused_losses():
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with use_fused_losses():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]


class _FusedSelfDistillation:
    """SDFTTrainer and SDPOTrainer, which ask the models for logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.distillation_mode == "topk_logits":  # type: ignore[attr-defined]
            raise ValueError(
                "distillation_mode: 'topk_logits' has no fused loss; 'full_logits', which it "
                "approximates, needs less memory here"
            )
        _refuse_sharding(self)

    def _forward_logits(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> HeadInput:
        temperature = self.temperature  # type: ignore[attr-defined]
        core = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        with hidden_as_logits(core) as heads, replaced(self, "temperature", 1.0):
            hidden = super()._forward_logits(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep
            )
        keep = attention_mask[:, -logits_to_keep:] != 0
        return HeadInput(hidden, heads[-1], temperature, keep)

    def _compute_rollout_logps(self, *args: Any, **kwargs: Any) -> Any:
        with self._loss_functions():
            return super()._compute_rollout_logps(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._loss_functions():
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def _loss_functions(self) -> ExitStack:
        """Replaces the functions that this trainer's module calls with logits."""
        module = sys.modules[_defining_class(type(self)).__module__]
        stack = ExitStack()
        for name, function in (
            ("compute_full_logit_self_distillation_loss", head_input.full_logits_loss),
            ("compute_sampled_token_self_distillation_loss", head_input.sampled_token_loss),
            ("selective_log_softmax", head_input.selective_log_softmax),
        ):
            stack.enter_context(replaced(module, name, function))
        return stack


class _FusedGeneralizedJsd:
    """GKDTrainer, and GOLDTrainer for models that share a tokenizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "use_uld_loss", False):
            raise ValueError(
                "use_uld_loss: True has no fused loss; set False if the models share a tokenizer"
            )
        _refuse_sharding(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        compute = functools.partial(
            super().compute_loss,  # type: ignore[misc]
            model,
            inputs,
            return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if return_outputs:  # compute_metrics reads the logits
            return compute()
        unwrap = self.accelerator.unwrap_model  # type: ignore[attr-defined]
        cores = unwrap(model), unwrap(self.teacher_model)  # type: ignore[attr-defined]
        with hidden_as_logits(*cores) as heads:
            loss = functools.partial(_generalized_jsd, heads)
            with replaced(self, "generalized_jsd_loss", loss):
                return compute()


def _generalized_jsd(
    heads: list[LmHead],  # the student's and the teacher's
    student_logits: Tensor,  # (B, T, D_s), hidden states in truth
    teacher_logits: Tensor,  # (B, T, D_t)
    labels: Tensor,  # (B, T)
    beta: float = 0.5,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | float | None = None,
) -> Any:
    """Stands for the trainers' generalized_jsd_loss."""
    student, teacher = heads
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student_logits.device)
    return fused_linear_jsd(
        **pair_arguments(student_logits, student, teacher_logits, teacher),
        shift_labels=labels,
        beta=beta,
        temperature=temperature,
        num_tokens=num_items_in_batch,
    )


def _refuse_sharding(trainer: Any) -> None:
    """The loss runs after the model's forward, when a sharded head is gone again."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"{type(trainer).__name__}: FSDP and DeepSpeed are not supported; use DDP, or "
            "DistillationTrainer, whose loss runs inside the model's forward"
        )


def _defining_class(trainer: type) -> type:
    return next(c for c in trainer.__mro__ if f"{c.__module__}.{c.__qualname__}" in _MIXINS)


_MIXINS: dict[str, type] = {
    "trl.trainer.sft_trainer.SFTTrainer": _FusedLookups,
    "trl.trainer.grpo_trainer.GRPOTrainer": _FusedLookups,
    "trl.trainer.rloo_trainer.RLOOTrainer": _FusedLookups,
    "trl.trainer.distillation_trainer.DistillationTrainer": _FusedLookups,
    "trl.experimental.sdft.sdft_trainer.SDFTTrainer": _FusedSelfDistillation,
    "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer": _FusedSelfDistillation,
    "trl.experimental.gkd.gkd_trainer.GKDTrainer": _FusedGeneralizedJsd,
    "trl.experimental.gold.gold_trainer.GOLDTrainer": _FusedGeneralizedJsd,
}
