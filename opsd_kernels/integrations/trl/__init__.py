"""TRL's trainers on the fused losses: same numbers, without the [tokens, vocabulary] logits.

use_fused_losses()          for this process: SFTTrainer, GRPOTrainer, RLOOTrainer,
                            DistillationTrainer
fused(Trainer)(...)         one trainer class: those, and SDFTTrainer, SDPOTrainer, GKDTrainer,
                            GOLDTrainer
"""

from opsd_kernels.integrations.trl.lookups import use_fused_losses
from opsd_kernels.integrations.trl.trainers import fused
from opsd_kernels.integrations.trl.version import KNOWN_VERSIONS

__all__ = ["KNOWN_VERSIONS", "fused", "use_fused_losses"]
