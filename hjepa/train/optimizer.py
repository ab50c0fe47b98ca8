"""AdamW, and Muon for the matrices of transformer blocks with AdamW for everything else, as one optimiser.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by its nearest orthogonal matrix, so that all
directions of it move alike. torch.optim.Muon does the work; its step length is matched to AdamW's (Liu et al., 2025,
"Muon is scalable for LLM training", section 2.2). Here the two share one list of groups and one state, so that a
checkpoint, a schedule and Accelerate see a single optimiser.

Not covered: Muon on matrices cut over processes (FSDP), which would each be made orthogonal by itself: refused.
"""

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)  # of AdamW beside Muon


def parameter_groups(model: nn.Module, weight_decay: float, *, muon: bool = False) -> list[dict[str, Any]]:
    """Groups of a model's trained parameters.

    The weights of linear and convolution layers decay; biases, norms, tokens, position embeddings and frequencies do
    not. Parameters without gradient (the target encoder) are in none. muon: the linear weights of blocks come first,
    as a group of their own.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {id(p) for name, p in named if muon and ".blocks." in f".{name}" and p.dim() == 2 and id(p) in linear}
    trained = [p for _, p in named]
    groups = [
        {"params": [p for p in trained if id(p) in linear and id(p) not in hidden], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in linear], "weight_decay": 0.0},
    ]
    matrices = {"params": [p for p in trained if id(p) in hidden], "weight_decay": weight_decay}
    return [matrices, *groups] if muon else groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the first group, AdamW on the others.

    Args:
        groups: from `parameter_groups(model, .., muon=True)`.
        muon_lr: learning rate of Muon; its step has the root mean square of an AdamW step of .2 times that rate.
        lr: learning rate of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, muon_lr: float, lr: float) -> None:
        matrices, *rest = groups
        self._muon = torch.optim.Muon(
            matrices["params"], lr=muon_lr, weight_decay=matrices["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=BETAS, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state  # loading a state dict has put new ones in their place
        self._muon.step()
        self._adamw.step()


def build_optimizer(
    model: nn.Module, *, kind: str = "adamw", lr: float = 1e-3, muon_lr: float = 1e-2, weight_decay: float = 0.05
) -> torch.optim.Optimizer:
    """The optimiser of a model; each group keeps its peak learning rate under "peak"."""
    groups = parameter_groups(model, weight_decay, muon=kind == "muon")
    if kind == "muon":
        optimizer: torch.optim.Optimizer = MuonAdamW(groups, muon_lr=muon_lr, lr=lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer
