"""HJEPA: predict, from the patches seen, the features of hidden cells at every level of a 2-D hierarchy; up to the top,
the picture itself, which all views of it share.

    context     = context_encoder(views, the patches seen)
    targets     = pool(target_encoder(large views))            no gradient, weights an average of the context encoder's
    predictions = predictor(context, (level, centre of each hidden cell))
    embeddings  = projector(mean of a view's tokens)           the top level

    objective   masks    sum over levels of weight * distance(predictions, layer-normed targets)
                views    view_loss(embeddings): near for views of one picture, apart for others (`losses.py`)
                both     their weighted sum, from the same pass of the context encoder
                labels   cross-entropy of a linear classifier on the mean token: the positive control

Level l pools the target's patch features over 2^l x 2^l cells of the patch GRID (not of the list of tokens), and a
coarse cell's position is the mean of its patches' positions: a fraction that RoPE rotates by. The last level is the
whole picture: no position, and no predictor but the projector.

Nothing in the distance of masked cells itself keeps features from collapsing to a constant; the moving average, the
masking and, if asked for, a regularizer on the context encoder's features do (`losses.py`). The view loss does.

Sources: Assran et al., "I-JEPA", 2023 (loss on layer-normed targets, smooth L1 as in V-JEPA, Bardes et al., 2024);
masked large views beside small ones as in Assran et al., "Masked Siamese Networks", 2022.
Not covered: decoders.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import check_choice
from .encoders import ContextEncoder, TargetEncoder
from .frequencies import grid_positions
from .losses import REGULARIZERS, VIEW_LOSSES, sketched_gaussian_regularizer, variance_regularizer, view_loss
from .masks import Masks
from .predictor import Predictor

DISTANCES = ("smooth_l1", "mse")
OBJECTIVES = ("masks", "views", "both", "labels")


@dataclass
class HJEPAOutput:
    """What one forward pass gives. `loss` holds every weighted part; the rest is for logs and pictures."""

    loss: Tensor
    level_losses: Tensor  # [L], unweighted
    regularizer: Tensor  # scalar, unweighted
    cosine: Tensor  # scalar, mean cosine of predictions and targets at level 0, or of views of one picture
    predictions: tuple[Tensor, ...]  # per level [B, m_l, D]
    targets: tuple[Tensor, ...]  # per level [B, m_l, D]
    view_loss: Tensor  # scalar, unweighted
    features: Tensor  # [B, D], a pooled feature per image: the targets' at level 0, or the context encoder's


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
        predictor: built for their width, grid and number of levels; None where nothing is masked.
        objective: "masks", "views", "both" or "labels".
        level_weights: weight of each level's loss, level 0 (patches) first.
        distance: "smooth_l1" or "mse", of predictions from targets.
        regularizer: "none", "variance" or "sketched_gaussian", on the context encoder's mean feature per image.
        regularizer_weight: its weight in the loss.
        projector: for views: `build_projector(D, ..)`.
        views: "contrastive", "sketched_gaussian" or "variance" (`losses.view_loss`).
        masks_weight: of the masked cells beside the views in "both".
        temperature, spread_weight: of the view loss.
        teacher: the target encoder's embeddings of the large views are what views are compared with.
        classes: for labels: number of classes.

    Raises:
        ValueError: an unknown name, no level, or a part that the objective lacks.
    """

    def __init__(
        self,
        context_encoder: ContextEncoder,
        target_encoder: TargetEncoder,
        predictor: Predictor | None,
        *,
        objective: str = "masks",
        level_weights: Sequence[float] = (1.0, 0.5, 0.25),
        distance: str = "smooth_l1",
        regularizer: str = "none",
        regularizer_weight: float = 0.0,
        projector: nn.Module | None = None,
        views: str = "contrastive",
        masks_weight: float = 1.0,
        temperature: float = 0.1,
        spread_weight: float = 0.02,
        teacher: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("objective", objective, OBJECTIVES)
        check_choice("loss.kind", distance, DISTANCES)
        check_choice("loss.regularizer", regularizer, REGULARIZERS)
        check_choice("loss.view_loss", views, VIEW_LOSSES)
        if not 1 <= len(level_weights) <= 4:
            raise ValueError(f"level_weights={list(level_weights)} must name 1 to 4 levels")
        needed = {"predictor": (predictor, ("masks", "both")), "projector": (projector, ("views", "both"))}
        for name, (part, where) in needed.items():
            if objective in where and part is None:
                raise ValueError(f"objective={objective!r} needs a {name}")
        if objective == "labels" and not classes:
            raise ValueError(f"objective='labels' needs the number of classes, got classes={classes}")
        self.context_encoder, self.target_encoder, self.predictor = context_encoder, target_encoder, predictor
        self.objective, self.level_weights = objective, tuple(level_weights)
        self.distance = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
        self.regularizer, self.regularizer_weight = regularizer, regularizer_weight
        self.projector, self.views, self.temperature, self.spread_weight = projector, views, temperature, spread_weight
        self.masks_weight = masks_weight
        self.target_projector = copy.deepcopy(projector).requires_grad_(False) if projector and teacher else None
        self.classifier = nn.Linear(context_encoder.embed_dim, classes) if objective == "labels" and classes else None

    def forward(
        self,
        images: Tensor,
        masks: Masks | None = None,
        *,
        small: Tensor | None = None,
        pictures: int | None = None,
        places: Tensor | None = None,
        small_places: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HJEPAOutput:
        """Loss and its parts.

        Args:
            images: `[G B, C, h, w]`, G large views of B pictures, view by view; any size that fits the patch.
            masks: for every image; without targets (`target_idx=()`) they only say which patches are seen.
            small: `[L B, C, h', w']`, small views of the same pictures.
            pictures: B, where images are views.
            places, small_places: positions `[G B, N, 2]` and `[L B, N', 2]` of the patches in their pictures, in
                place of the grid's; RoPE only.
            labels: `[B]` int64, for "labels".

        Raises:
            ValueError: masks with another number of levels, views without `pictures`, no labels where they are needed.
        """
        grid = self.context_encoder.image_grid(images)
        index = None if masks is None else masks.context_idx
        if self.objective in ("masks", "both"):
            self._check_levels(masks)
        positions = self._positions(grid, images.device) if places is None else places
        context = self.context_encoder(images, index, positions=positions if self.context_encoder.use_rope else None)
        features = self._mean(context)
        if self.objective == "labels":
            return self._output(features, loss=self._label_loss(features, labels))
        seen = [features]
        if small is not None:
            seen.append(self._mean(self.context_encoder(small, positions=small_places)))
        whole = self._target_tokens(images, places) if self.target_projector or self.objective != "views" else None
        part = self._view_part(seen, whole, pictures) if self.objective != "masks" else None
        if self.objective == "views":
            return self._output(features, views=part)
        assert masks is not None and whole is not None and self.predictor is not None
        targets = self._gather_targets(whole, masks, grid)
        predictions = self.predictor(context, *self._places(positions, masks, grid), grid)
        return self._output(features, predictions, targets, views=part)

    def update_target(self, step: int) -> float:
        """Move the target encoder, and the target projector where there is one, after optimiser step `step`.

        Returns:
            the momentum used.
        """
        momentum = self.target_encoder.update_from_context_encoder(self.context_encoder, step)
        if self.target_projector is not None and self.projector is not None:
            with torch.no_grad():
                for mine, theirs in zip(
                    self.target_projector.state_dict().values(), self.projector.state_dict().values(), strict=True
                ):
                    mine.lerp_(theirs, 1 - momentum) if mine.is_floating_point() else mine.copy_(theirs)
        return momentum

    # ---- masked cells

    def _check_levels(self, masks: Masks | None) -> None:
        found = 0 if masks is None else len(masks.target_idx)
        if found != len(self.level_weights):
            raise ValueError(
                f"masks have {found} levels, level_weights={self.level_weights} needs one per weight"
            )

    @torch.no_grad()
    def make_targets(self, images: Tensor, masks: Masks, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Layer-normed target features of the cells asked for, one `[B, m_l, D]` per level."""
        return self._gather_targets(self._target_tokens(images, None), masks, grid)

    @torch.no_grad()
    def _target_tokens(self, images: Tensor, places: Tensor | None) -> Tensor:
        """The target encoder's patch features `[B, N, D]`: one pass serves cells and views."""
        tokens = self.target_encoder(images, positions=places if self.target_encoder.use_rope else None)
        return tokens[:, self.target_encoder.num_prefix_tokens :]

    @staticmethod
    def _gather_targets(patches: Tensor, masks: Masks, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        patches = F.layer_norm(patches, patches.shape[-1:])
        pooled = (pool_to_level(patches, grid, level) for level in range(len(masks.target_idx)))
        return tuple(
            cells.gather(1, index[..., None].expand(-1, -1, cells.shape[-1]))
            for cells, index in zip(pooled, masks.target_idx, strict=True)
        )

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The grid's positions `[N, 2]`, augmented in training: context and predictor share one draw."""
        rope = self.context_encoder.rope
        positions = grid_positions(*grid, device=device)
        return rope.augment(positions, grid) if rope is not None and self.training else positions

    @staticmethod
    def _places(positions: Tensor, masks: Masks, grid: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Positions of the context patches `[B, n, 2]` and of each level's queries `[B, m_l, 2]`."""
        positions = positions if positions.dim() == 3 else positions.expand(len(masks.context_idx), -1, -1)
        at = [pool_to_level(positions, grid, level) for level in range(len(masks.target_idx))]
        pick = [cells.gather(1, i[..., None].expand(-1, -1, 2)) for cells, i in zip(at, masks.target_idx, strict=True)]
        return positions.gather(1, masks.context_idx[..., None].expand(-1, -1, 2)), tuple(pick)

    # ---- views and labels

    def _mean(self, tokens: Tensor) -> Tensor:
        """Mean patch token `[B, D]` in float32."""
        return tokens[:, self.context_encoder.num_prefix_tokens :].float().mean(1)

    def _view_part(
        self, seen: list[Tensor], whole: Tensor | None, pictures: int | None
    ) -> tuple[Tensor, Tensor]:
        """The view loss over the global batch, and the mean cosine of the first two views of a picture."""
        if pictures is None:
            raise ValueError(f"objective={self.objective!r} needs pictures, the number that the views are of")
        assert self.projector is not None
        with torch.autocast(seen[0].device.type, enabled=False):
            z = _embed(self.projector, torch.cat(seen), pictures)
            targets = None
            if self.target_projector is not None and whole is not None:
                with torch.no_grad():
                    targets = _embed(self.target_projector, whole.float().mean(1), pictures)
            loss = view_loss(
                z, targets, kind=self.views, large=len(seen[0]) // pictures, temperature=self.temperature,
                weight=self.spread_weight,
            )  # fmt: skip
        return loss, F.cosine_similarity(z[0].detach(), z[1].detach(), dim=-1).mean()

    def _label_loss(self, features: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or self.classifier is None:
            raise ValueError("objective='labels' needs labels, one per picture")
        with torch.autocast(features.device.type, enabled=False):
            scores = self.classifier(features)  # [G B, classes], view by view
            return F.cross_entropy(scores, labels.repeat(len(scores) // len(labels)))

    # ---- the sum

    def _output(
        self,
        features: Tensor,
        predictions: tuple[Tensor, ...] = (),
        targets: tuple[Tensor, ...] = (),
        *,
        views: tuple[Tensor, Tensor] | None = None,
        loss: Tensor | None = None,
    ) -> HJEPAOutput:
        zero = features.new_zeros(())
        levels = [self.distance(p, t) for p, t in zip(predictions, targets, strict=True)]
        losses = torch.stack(levels) if levels else features.new_zeros(0)
        total = zero if loss is None else loss
        if levels:
            weight = self.masks_weight if views is not None else 1.0
            total = total + weight * (losses * losses.new_tensor(self.level_weights)).sum()
        if views is not None:
            total = total + views[0]
        regularizer = zero
        if self.regularizer != "none":
            regularizer = self._regularize(features)
            total = total + self.regularizer_weight * regularizer
        cosine = zero if views is None else views[1]
        if levels:
            cosine = F.cosine_similarity(predictions[0].detach(), targets[0], dim=-1).mean()
        return HJEPAOutput(
            total, losses.detach(), regularizer.detach(), cosine, predictions, targets,
            zero if views is None else views[0].detach(),
            targets[0].float().mean(1) if targets else features.detach(),
        )  # fmt: skip

    def _regularize(self, features: Tensor) -> Tensor:
        """The regularizer over the global batch, whatever the number of processes."""
        term = variance_regularizer if self.regularizer == "variance" else sketched_gaussian_regularizer
        return term(_over_processes(features[:, None])[:, 0].float())


def build_projector(width: int, hidden: int = 512, out: int = 128) -> nn.Sequential:
    """D -> hidden -> out, with batch norm and ReLU between: what the view loss sees, thrown away after training."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
    )


def _embed(projector: nn.Module, features: Tensor, pictures: int) -> Tensor:
    """`[V b, D]` features of this process, view by view -> `[V, B, out]` embeddings of the global batch.

    Every process projects all of them, so that the batch norm sees the same batch on any number of processes.
    """
    views = _over_processes(features.unflatten(0, (-1, pictures)).transpose(0, 1))  # [B, V, D]
    return projector(views.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(views)))


def _over_processes(rows: Tensor) -> Tensor:
    """`[b, ...]` of every process -> `[B, ...]` of all, with gradient.

    Gathered as a matrix: torch's backward pass for gloo takes gradients for contiguous, and those of a transposed
    tensor come out in another order.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.cat(dist_nn.all_gather(rows.flatten(1))).unflatten(1, rows.shape[1:])
    return rows
