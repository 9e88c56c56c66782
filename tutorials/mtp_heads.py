"""Multi-token-prediction heads: the solution to exercise 1 of 4_mpo.ipynb. Try it first.

An earlier version of MPO (arXiv 2602.14386) takes the probabilities of a block's later tokens from
extra heads that all look at the state before its first token: head n predicts the token n places
further on, without seeing those between. `mpo.py` takes the policy's own, teacher-forced, instead.
The architecture of the paper's heads is not public; this is the plainest that learns: a residual
layer for each head, read out by the policy's own output matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common


def future_targets(targets: Tensor, mask: Tensor, ahead: int) -> Tensor:
    """(B, T) the id `ahead` places after each token of targets (B, T); -1 where there is none.

    mask (B, T) bool: True where an id stands, which is up to each row's length.
    """
    rows, length = targets.shape
    later = torch.full((rows, length), -1)
    size = max(0, length - ahead)
    later[:, :size] = targets.masked_fill(~mask, -1)[:, length - size :]
    return later


class Heads(nn.Module):
    """Predict the tokens 1 ... K - 1 places after the next one, from the state before that."""

    def __init__(self, model, block_size: int):
        super().__init__()
        size = model.config.hidden_size
        self.up = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(block_size - 1))
        self.down = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(block_size - 1))
        for down in self.down:  # at first each head says what the policy says of the next token
            nn.init.zeros_(down.weight)
            nn.init.zeros_(down.bias)

    def forward(self, hidden: Tensor, readout: nn.Module) -> list[Tensor]:
        """hidden (..., H) -> for each head, log-probs (..., V)."""
        states = [hidden + down(F.silu(up(hidden))) for up, down in zip(self.up, self.down)]
        return [readout(state).log_softmax(-1) for state in states]


@torch.no_grad()
def states_before(model, batch: common.Batch) -> Tensor:
    """(B, T, H) the policy's last hidden state before each trained id; 0 outside the mask."""
    hidden = model.base_model(batch.input_ids, use_cache=False).last_hidden_state  # (B, L, H)
    row, t = batch.mask.nonzero(as_tuple=True)
    states = hidden.new_zeros(*batch.mask.shape, hidden.shape[-1])
    states[row, t] = hidden[row, batch.context_lens[row] + t - 1]
    return states


def train_heads(model, heads: Heads, batch: common.Batch, steps: int, lr=3e-3) -> list[float]:
    """Fit the heads to the answers of a batch, the policy staying as it is; returns the losses."""
    hidden, readout = states_before(model, batch), model.get_output_embeddings()
    wanted = [future_targets(batch.targets, batch.mask, n + 1) for n in range(len(heads.up))]
    optimizer, losses = torch.optim.AdamW(heads.parameters(), lr=lr), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(hidden), (64,), generator=generator)
        predicted = heads(hidden[rows], readout)
        loss = sum(
            F.nll_loss(p.flatten(0, 1), w[rows].flatten(), ignore_index=-1)
            for p, w in zip(predicted, wanted)
        ) / len(wanted)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def block_logprobs(model, heads: Heads, batch: common.Batch) -> Tensor:
    """(B, T, K) log-probs of each token and the K - 1 after it, all from the state before it; 0
    where there is none."""
    hidden, readout = states_before(model, batch), model.get_output_embeddings()
    predicted = [readout(hidden).log_softmax(-1), *heads(hidden, readout)]
    columns = []
    for n, p in enumerate(predicted):
        wanted = future_targets(batch.targets, batch.mask, n)
        chosen = p.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        columns.append(chosen.masked_fill(wanted < 0, 0.0))
    return torch.stack(columns, -1)
