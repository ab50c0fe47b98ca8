"""HJEPA: predict, from the patches seen, the features of hidden cells at every level of a 2-D hierarchy.

    context     = context_encoder(images, the patches seen)
    targets     = pool(target_encoder(images))                 no gradient, weights an average of the context encoder's
    predictions = predictor(context, (level, centre of each hidden cell))
    loss        = sum over levels of weight * distance(predictions, layer-normed targets)

Level l pools the target's patch features over 2^l x 2^l cells of the patch GRID (not of the list of tokens), and a
coarse cell's position is the mean of its patches' positions: a fraction that RoPE rotates by.

Nothing in the distance itself keeps the features from collapsing to a constant; the moving average, the masking and,
if asked for, a regularizer on the context encoder's features do:
    variance           hinge on the standard deviation and squared off-diagonal covariance (VICReg, Bardes et al., 2022)
    sketched_gaussian  characteristic function of random projections held to a Gaussian's (after LeJEPA's SIGReg,
                       Balestriero & LeCun, 2025)

Sources: Assran et al., "I-JEPA", 2023 (loss on layer-normed targets, smooth L1 as in V-JEPA, Bardes et al., 2024).
Not covered: several views of one image, decoders.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import check_choice
from .encoders import ContextEncoder, TargetEncoder
from .losses import REGULARIZERS, sketched_gaussian_regularizer, variance_regularizer
from .masks import Masks
from .predictor import Predictor

DISTANCES = ("smooth_l1", "mse")


@dataclass
class HJEPAOutput:
    """What one forward pass gives. `loss` includes the weighted regularizer; the rest is for logs and pictures."""

    loss: Tensor
    level_losses: Tensor  # [L], unweighted
    regularizer: Tensor  # scalar, unweighted
    cosine: Tensor  # scalar, mean cosine of predictions and targets at level 0
    predictions: tuple[Tensor, ...]  # per level [B, m_l, D]
    targets: tuple[Tensor, ...]  # per level [B, m_l, D]


def pool_to_level(patches: Tensor, grid_size: tuple[int, int], level: int) -> Tensor:
    """Mean over the 2^l x 2^l cells of the grid: `[B, H * W, D]` -> `[B, cells, D]`; border cells may be smaller."""
    if level == 0:
        return patches
    on_grid = patches.unflatten(1, grid_size).permute(0, 3, 1, 2)
    return F.avg_pool2d(on_grid, 1 << level, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


def cell_centres(positions: Tensor, grid_size: tuple[int, int], level: int) -> Tensor:
    """Position of each cell of `level`, the mean of its patches' positions: `[H * W, 2]` -> `[cells, 2]`."""
    return pool_to_level(positions[None], grid_size, level)[0]


class HJEPA(nn.Module):
    """Context encoder, target encoder and predictor with their loss.

    Args:
        context_encoder, target_encoder: from `create_encoder`.
        predictor: built for their width, grid and number of levels.
        level_weights: weight of each level's loss, level 0 (patches) first.
        distance: "smooth_l1" or "mse".
        regularizer: "none", "variance" or "sketched_gaussian", on the context encoder's mean feature per image.
        regularizer_weight: its weight in the loss.

    Raises:
        ValueError: an unknown name, or no level.
    """

    def __init__(
        self,
        context_encoder: ContextEncoder,
        target_encoder: TargetEncoder,
        predictor: Predictor,
        *,
        level_weights: Sequence[float] = (1.0, 0.5, 0.25),
        distance: str = "smooth_l1",
        regularizer: str = "none",
        regularizer_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("loss.kind", distance, DISTANCES)
        check_choice("loss.regularizer", regularizer, REGULARIZERS)
        if not 1 <= len(level_weights) <= 4:
            raise ValueError(f"level_weights={list(level_weights)} must name 1 to 4 levels")
        self.context_encoder, self.target_encoder, self.predictor = context_encoder, target_encoder, predictor
        self.level_weights = tuple(level_weights)
        self.distance = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
        self.regularizer, self.regularizer_weight = regularizer, regularizer_weight

    def forward(self, images: Tensor, masks: Masks) -> HJEPAOutput:
        """Loss and its parts for `images` `[B, C, h, w]` of any size that fits the patch."""
        grid = self.context_encoder.image_grid(images)
        if len(masks.target_idx) != len(self.level_weights):
            raise ValueError(
                f"masks have {len(masks.target_idx)} levels, level_weights={self.level_weights} needs one per weight"
            )
        positions = self._positions(grid, images.device)
        context = self.context_encoder(
            images, masks.context_idx, positions=positions if self.context_encoder.use_rope else None
        )
        targets = self.make_targets(images, masks, grid)
        predictions = self.predictor(context, *self._places(positions, masks, grid), grid)
        return self._output(context, predictions, targets)

    @torch.no_grad()
    def make_targets(self, images: Tensor, masks: Masks, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Layer-normed target features of the cells asked for, one `[B, m_l, D]` per level."""
        patches = self.target_encoder(images)[:, self.target_encoder.num_prefix_tokens :]
        patches = F.layer_norm(patches, patches.shape[-1:])
        pooled = (pool_to_level(patches, grid, level) for level in range(len(masks.target_idx)))
        return tuple(
            cells.gather(1, index[..., None].expand(-1, -1, cells.shape[-1]))
            for cells, index in zip(pooled, masks.target_idx, strict=True)
        )

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The grid's positions `[N, 2]`, augmented in training: context and predictor share one draw."""
        rope = self.context_encoder.rope
        rows, columns = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
        positions = torch.cartesian_prod(rows, columns).float()
        return rope.augment(positions, grid) if rope is not None and self.training else positions

    @staticmethod
    def _places(positions: Tensor, masks: Masks, grid: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Positions of the context patches `[B, n, 2]` and of each level's queries `[B, m_l, 2]`."""
        queries = tuple(
            cell_centres(positions, grid, level)[index] for level, index in enumerate(masks.target_idx)
        )
        return positions[masks.context_idx], queries

    def _output(self, context: Tensor, predictions: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> HJEPAOutput:
        losses = torch.stack([self.distance(p, t) for p, t in zip(predictions, targets, strict=True)])
        loss = (losses * losses.new_tensor(self.level_weights)).sum()
        regularizer = losses.new_zeros(())
        if self.regularizer != "none":
            regularizer = self._regularize(context[:, self.context_encoder.num_prefix_tokens :].mean(1))
            loss = loss + self.regularizer_weight * regularizer
        cosine = F.cosine_similarity(predictions[0].detach(), targets[0], dim=-1).mean()
        return HJEPAOutput(loss, losses.detach(), regularizer.detach(), cosine, predictions, targets)

    def _regularize(self, features: Tensor) -> Tensor:
        """The regularizer over the global batch, whatever the number of processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            features = torch.cat(dist_nn.all_gather(features))
        term = variance_regularizer if self.regularizer == "variance" else sketched_gaussian_regularizer
        return term(features.float())
