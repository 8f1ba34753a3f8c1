"""A plugin for ms-swift: its GKD trainer without the logits of student or teacher.

    swift rlhf --rlhf_type gkd --external_plugins examples/plugins/ms_swift.py ...

The teacher is a local model or the student itself, and may have a prompt of its own (OPSD). FSDP,
ZeRO-3, sequence parallel, teacher servers, top-k, sft_alpha, two vocabularies and logits that are
more than hidden states times a head keep ms-swift's own loss. With or without --use_liger_kernel.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from swift.rlhf_trainers import gkd_trainer as gkd
from swift.version import __version__
from torch import Tensor, nn

from opsd_kernels import fused_linear_jsd

KNOWN = ("4.6.0",)
if __version__ not in KNOWN:
    raise ImportError(f"ms_swift.py knows ms-swift {', '.join(KNOWN)}, not {__version__}")
loss_with_logits = gkd.GKDTrainer.compute_loss


def hidden_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(N, D): last hidden states where the next token has a label."""
    core = model.base_model.model if gkd.is_peft_model(model) else model
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = getattr(core, core.base_model_prefix)(**rest, use_cache=False).last_hidden_state
    return hidden[inputs["labels"].roll(-1, dims=1) != -100]


@torch.no_grad()
def linear_vocabulary(model: nn.Module) -> int:
    """Entries of the head, or 0 if the logits of 8 tokens are not hidden states times head."""
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(8, device=model.device).unsqueeze(0)
    model.eval()  # no dropout between the two
    hidden = hidden_of(model, {"input_ids": ids, "labels": ids}).to(head.weight.dtype)
    product, logits = head(hidden.unsqueeze(0)), model(input_ids=ids, use_cache=False).logits
    model.train(training)
    allowed = max(1e-6, torch.finfo(product.dtype).eps) * product.abs().max()
    equal = (product.float() - logits.float()).abs().max() <= allowed
    return head.out_features if type(head) is nn.Linear and equal else 0


def prepare(self: gkd.GKDTrainer) -> None:
    """Instead of preparing Liger's loss: whether this run is served."""
    plugin, teacher = self.accelerator.state.deepspeed_plugin, self.teacher_model or self.model
    self.fused = not (
        self.is_fsdp_enabled
        or (plugin is not None and plugin.zero_stage == 3)
        or self.template.sequence_parallel_size > 1
        or (self.use_teacher_api or self.gkd_logits_topk is not None or self.args.sft_alpha > 0)
    )
    if self.fused:
        with self.load_teacher_model_context():
            models = (self.model, self.accelerator.unwrap_model(teacher))
            sizes = {linear_vocabulary(model) for model in models}
        self.fused = len(sizes) == 1 and 0 not in sizes
    if not self.fused:
        gkd.logger.warning("ms_swift.py does not serve this run: it makes logits")
    if self.args.use_liger_kernel and not self.fused:
        raise ValueError("ms_swift.py does not serve this run: leave out --use_liger_kernel")
    self.use_liger_gkd_loss, self._forward_redirection = False, gkd._ForwardRedirection()


def divergence(self: gkd.GKDTrainer, student: nn.Module, batch: dict, *_: Any, **__: Any) -> Tensor:
    """The mean over the labels of a micro-batch, as ms-swift's own loss."""
    itself = self.teacher_model is None
    teacher = student if itself else self.accelerator.unwrap_model(self.teacher_model)
    no_lora = itself and self._teacher_use_disable_adapter
    adapter = student.disable_adapter() if no_lora else nullcontext()
    checkpointing = partial(gkd.disable_gradient_checkpointing, teacher)
    h_s, head_s = hidden_of(student, batch["model_inputs"]), student.get_output_embeddings()
    with self.load_teacher_model_context():
        with torch.no_grad(), adapter, checkpointing(self.args.gradient_checkpointing_kwargs):
            h_t = hidden_of(teacher, batch["teacher_model_inputs"])
        head_t = teacher.get_output_embeddings()
        return fused_linear_jsd(
            h_s, head_s.weight, h_t, head_t.weight,
            student_bias=head_s.bias, teacher_bias=head_t.bias,
            beta=self.beta, temperature=self.temperature, num_tokens=max(1, h_s.shape[0]),
        )  # fmt: skip


def compute_loss(
    self: gkd.GKDTrainer,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: int | None = None,
) -> Any:
    """ms-swift's `compute_loss`; inside the wrapper's forward, which DDP needs."""
    if not self.fused:
        return loss_with_logits(self, model, inputs, return_outputs, num_items_in_batch)
    student = self.accelerator.unwrap_model(model)
    loss = self._forward_redirection(
        model, student, partial(divergence, self, student, inputs), **inputs["model_inputs"]
    )
    return (loss, None) if return_outputs else loss


gkd.GKDTrainer._prepare_liger_loss, gkd.GKDTrainer.compute_loss = prepare, compute_loss
