"""The reference solution: the project's own functions. Read it after yours, not before."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (  # noqa: E402, F401
    clipped_surrogate,
    group_advantages,
    k3,
    step_starts,
    token_logprobs,
)
from mpo import block_log_ratio, block_weights, mpo_loss, scaled_eps  # noqa: E402, F401
from reset_po import localise_uncertain, masked_mean, reset_loss  # noqa: E402, F401
from spo import (  # noqa: E402, F401
    chain_advantages,
    segment_starts,
    spo_loss,
    trained_tokens,
    tree_advantages,
)
