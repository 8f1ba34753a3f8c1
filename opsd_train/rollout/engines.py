"""Makes the engine that a recipe names."""

from __future__ import annotations

from typing import Any

from opsd_train.config.schema import Config
from opsd_train.methods import METHODS
from opsd_train.model.policy import Policy
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.rollout import Engine
from opsd_train.rollout.context_checks import context_of
from opsd_train.rollout.mixture import TeacherMixture
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.rollout.vllm_engine import VllmEngine
from opsd_train.rollout.vllm_server_engine import VllmServerEngine


def make_engine(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    folder: RunFolder,
    mixture: TeacherMixture | None = None,
) -> Engine:
    """The engine that rollout.engine names, ready to generate. Every rank calls it.

    mixture  a teacher that the transformers engine samples from too

    Raises UserError if the engine cannot serve the model, or is not installed.
    """
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens)
    longest += config.prompts.max_prompt_tokens
    # vLLM refuses a longer one than the model's context; prompts were checked to fit.
    max_model_len = min(longest, context_of(policy.core.config) or longest)
    if config.rollout.engine == "vllm":
        return VllmEngine(
            policy.model,
            tokenizer,
            config.rollout,
            model_config=config.model,
            scratch=folder.scratch,
            max_model_len=max_model_len,
            seed=config.seed,
        )
    if config.rollout.engine == "vllm-server":
        return VllmServerEngine(
            policy,
            tokenizer,
            config.rollout,
            model_name=config.model.name_or_path,
            scratch=folder.scratch,
            max_model_len=max_model_len,
            context=folder.context,
        )
    engine = TransformersEngine(policy, tokenizer, config.rollout, mixture)
    if METHODS[config.method].source(config) != "solution" or config.evaluation.problems:
        engine.prove(config.model.name_or_path)
    return engine
