"""Which tokens end a completion."""

from __future__ import annotations

from typing import Any

from opsd_train.config.engine_schema import EngineConfig
from opsd_train.config.errors import UserError
from opsd_train.data.chat_tokens import turn_end


def stop_ids(tokenizer: Any, generation_config: Any, config: EngineConfig) -> list[int]:
    """Sorted token ids that end a completion.

    The tokenizer's end token, those of the model's generation_config, the chat template's end of a
    turn, and stop_tokens of the recipe. Raises UserError for a stop_tokens text of several tokens.
    """
    own = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])} - {None}
    ids.add(turn_end(tokenizer)[-1])
    return sorted(ids | {_single_id(tokenizer, text) for text in config.stop_tokens})


def _single_id(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"rollout.stop_tokens: {text!r} is not one token of the tokenizer but "
            f"{len(ids)} ({tokenizer.convert_ids_to_tokens(ids)}); name a single token"
        )
    return ids[0]
