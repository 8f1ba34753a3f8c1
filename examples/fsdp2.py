"""FSDP2: self-distillation with embeddings, layers and head sharded over all ranks.

Outside a forward the head's weight is a DTensor, which the losses refuse: make the loss a method of
the model that FSDP treats as a forward. (A frozen head can be passed as weight.full_tensor().)

CPU:     torchrun --nproc-per-node 2 examples/fsdp2.py
8 GPUs:  torchrun --nproc-per-node 8 examples/fsdp2.py
"""

from types import MethodType

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import LlamaConfig, LlamaForCausalLM

from opsd_kernels import fused_linear_jsd

TINY = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HINT, COMPLETION = 8, 6  # tokens: the teacher also sees the first 8; the last 6 are scored


def self_distillation(model: nn.Module, ids: Tensor, num_tokens: int) -> Tensor:
    with torch.no_grad():
        teacher = model.model(input_ids=ids).last_hidden_state[:, -COMPLETION - 1 : -1]
    student = model.model(input_ids=ids[:, HINT:]).last_hidden_state[:, -COMPLETION - 1 : -1]
    head = model.lm_head.weight  # (V, D), a plain tensor here
    return fused_linear_jsd(student, head, teacher, head, num_tokens=num_tokens)


def main() -> None:
    distributed.init_process_group()  # gloo for CPU tensors, nccl for CUDA's
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.get_node_local_rank())
    torch.manual_seed(0)  # the same weights and tokens on every rank
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.2))
    model.self_distillation = MethodType(self_distillation, model)
    for module in (*model.model.layers, model):
        fully_shard(module)  # onto this rank's GPU where there is one
        module.set_gradient_divide_factor(1.0)  # sum over ranks: num_tokens counts all of them
        module.set_force_sum_reduction_for_comms(True)  # needed by gloo
    register_fsdp_forward_method(model, "self_distillation")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(261, (8, 24)).to(model.device)
    for step in range(4):
        loss = model.self_distillation(ids[rank::ranks], num_tokens=len(ids) * COMPLETION)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(loss.detach_())
        if rank == 0:
            print(f"step {step}: loss {loss:.7f}, gradient norm {norm:.7f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
