"""The contenders."""

OURS = "opsd_train"

# Name in the table -> TRL's distillation_mode and whether mixed precision is on; None for ours.
CONTENDERS: dict[str, tuple[str, bool] | None] = {
    OURS: None,
    "TRL SDFTTrainer, full logits": ("full_logits", True),
    "TRL SDFTTrainer, full logits, bf16=False": ("full_logits", False),
    "TRL SDFTTrainer, top-k 100 (its default)": ("topk_logits", True),
}
