"""Who takes part."""

OURS = "opsd_train"

# Name in the table: TRL's distillation_mode, None for ours.
CONTENDERS: dict[str, str | None] = {
    OURS: None,
    "TRL SDFTTrainer, full logits": "full_logits",
    "TRL SDFTTrainer, top-k 100 (its default)": "topk_logits",
}
