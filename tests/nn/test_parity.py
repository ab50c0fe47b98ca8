"""The same rotation as the peers: timm, transformers, rotary-embedding-torch. V-JEPA 2's frozen table is none.

Scores of queries with keys are compared where a peer measures positions from another origin, values elsewhere.
"""

import inspect

import pytest
import timm
import torch
from formulas import offset_spread, patch_positions
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import Tensor

from hjepa.nn.encoders import ContextEncoder
from hjepa.nn.rope import VisionRoPE2D

GRIDS = [(14, 14), (7, 28), (28, 7)]
DIM = 32


def random_qk(grid: tuple[int, int], heads: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, heads, grid[0] * grid[1], DIM)
    return q, k


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def swap_halves(x: Tensor) -> Tensor:
    """Row channels and column channels change places."""
    return torch.cat((x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)


def to_half_split(x: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) laid out as pairs (i, i + D/2)."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def timm_cat(grid: tuple[int, int], theta: float, **options: object) -> Tensor:
    peer = RotaryEmbeddingCat(DIM, temperature=theta, in_pixels=False, **options)
    return peer.get_embed(list(grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_axial_equals_timm_row_first(grid: tuple[int, int], theta: float) -> None:
    q, k = random_qk(grid)
    embed = timm_cat(grid, theta, grid_indexing="ij")
    for x, y in zip((q, k), VisionRoPE2D(DIM, theta=theta)(q, k, *grid), strict=True):
        torch.testing.assert_close(y, apply_rot_embed_cat(x, embed), atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_axial_equals_timm_column_first_after_swapping_channel_halves(grid: tuple[int, int]) -> None:
    q, k = random_qk(grid)
    embed = timm_cat(grid, 100.0, grid_indexing="xy")
    for x, y in zip((q, k), VisionRoPE2D(DIM, theta=100.0)(q, k, *grid), strict=True):
        theirs = swap_halves(apply_rot_embed_cat(swap_halves(x), embed))
        torch.testing.assert_close(y, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [(21, 21), (10, 28)])
@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_interpolation_gives_the_scores_of_timm_s_reference_shape(grid: tuple[int, int], indexing: str) -> None:
    """timm scales positions about the first patch, we about the picture's edge: a shift that scores do not see."""
    q, k = random_qk(grid)
    embed = timm_cat(grid, 100.0, grid_indexing=indexing, ref_feat_shape=[14, 14])
    layout = swap_halves if indexing == "xy" else torch.clone
    theirs = scores(*(apply_rot_embed_cat(layout(x), embed) for x in (q, k)))
    rope = VisionRoPE2D(DIM, num_patches_per_side=14, theta=100.0, strategy="interpolate")
    torch.testing.assert_close(scores(*rope(q, k, *grid)), theirs, atol=1e-4, rtol=0)
    rope.strategy = "extrapolate"
    assert (scores(*rope(q, k, *grid)) - theirs).abs().max() > 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_mixed_equals_timm_with_its_frequencies(grid: tuple[int, int], indexing: str) -> None:
    q, k = random_qk(grid)
    peer = RotaryEmbeddingMixed(3 * DIM, depth=2, num_heads=3, temperature=10.0, grid_indexing=indexing)
    rope = VisionRoPE2D(DIM, theta=10.0, kind="mixed", num_heads=3, num_layers=2)
    first, second = (0, 1) if indexing == "ij" else (1, 0)
    assert rope.mixed is not None
    with torch.no_grad():
        rope.mixed.copy_(torch.stack((peer.freqs[first], peer.freqs[second]), dim=1))
    embeds = peer.get_embed(list(grid))
    for layer in range(2):
        for x, y in zip((q, k), rope(q, k, *grid, layer=layer), strict=True):
            torch.testing.assert_close(y, apply_rot_embed_cat(x, embeds[layer]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_normalized_coordinates_equal_timm_s_dinov3(grid: tuple[int, int]) -> None:
    q, k = random_qk(grid)
    embed = RotaryEmbeddingDinoV3(DIM, temperature=100.0).get_embed(list(grid))
    rope = VisionRoPE2D(DIM, theta=100.0, coordinates="normalized")
    for x, y in zip((q, k), rope(q, k, *grid), strict=True):
        theirs = apply_rot_embed_cat(to_half_split(x), embed, half=True)
        torch.testing.assert_close(to_half_split(y), theirs, atol=3e-5, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_normalized_coordinates_equal_transformers_dinov3(grid: tuple[int, int]) -> None:
    from transformers import DINOv3ViTConfig
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

    q, k = random_qk(grid)
    config = DINOv3ViTConfig(hidden_size=3 * DIM, num_attention_heads=3, patch_size=2, rope_theta=100.0)
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 2 * grid[0], 2 * grid[1]))
    prefix = torch.randn(2, 3, 5, DIM)
    theirs = dinov3.apply_rotary_pos_emb(
        *(torch.cat((prefix, to_half_split(x)), dim=2) for x in (q, k)), cos[None, None], sin[None, None]
    )
    rope = VisionRoPE2D(DIM, theta=100.0, coordinates="normalized")
    for peer, ours in zip(theirs, rope(q, k, *grid), strict=True):
        assert torch.equal(peer[:, :, :5], prefix)
        torch.testing.assert_close(to_half_split(ours), peer[:, :, 5:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_axial_equals_rotary_embedding_torch_in_lang_mode(grid: tuple[int, int]) -> None:
    from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb

    q, k = random_qk(grid)
    peer = RotaryEmbedding(dim=DIM // 2, freqs_for="lang", theta=100.0)
    angles = peer.get_axial_freqs(*grid).reshape(-1, DIM).detach()
    for x, y in zip((q, k), VisionRoPE2D(DIM, theta=100.0)(q, k, *grid), strict=True):
        torch.testing.assert_close(y, apply_rotary_emb(angles, x), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [64, (48, 96)])
def test_an_encoder_with_the_weights_of_timm_s_rotary_vit_gives_its_features(size: int | tuple[int, int]) -> None:
    """timm's `vit_small_patch16_rope_224` is another class (EVA) of the same transformer: only names differ."""
    torch.manual_seed(0)
    peer = timm.create_model("vit_small_patch16_rope_224", img_size=size, num_classes=0, depth=2).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = ContextEncoder(
        "vit_small_patch16_224", size, use_rope=True, rope_theta=100.0, use_absolute=False,
        vit={"depth": 2, "init_values": 1e-4},
    ).eval()  # fmt: skip
    state, half = {}, 32
    for name, value in peer.state_dict().items():
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if name.startswith("blocks.") and ".qkv." in name:  # column first there, row first here
            parts = value.unflatten(0, (3, 6, 2, half))
            parts = torch.stack((parts[0].flip(1), parts[1].flip(1), parts[2]))
            value = parts.flatten(0, 3)
        state[f"vit.{name}"] = value
    wanted = ours.state_dict().keys()
    ours.load_state_dict({name: value for name, value in state.items() if name in wanted})
    images = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        features = peer.forward_features(images)
        torch.testing.assert_close(ours(images), features, atol=2e-5, rtol=1e-4)


def vjepa2_scores(rotate: object, position: Tensor) -> Tensor:
    """Scores of one query and one key vector laid on every position, rotated by V-JEPA 2's function."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, DIM, dtype=torch.float64).expand(-1, -1, -1, len(position), -1)
    return scores(rotate(q, position), rotate(k, position))[0, 0]  # type: ignore[operator]


def test_vjepa2_s_frozen_table_is_not_relative_and_one_word_makes_it_so() -> None:
    from transformers.models.vjepa2 import modeling_vjepa2 as vjepa2

    position = torch.arange(12, dtype=torch.float64)
    places = torch.stack((position, torch.zeros(12, dtype=torch.float64)), dim=-1)
    spread, _ = offset_spread(vjepa2_scores(vjepa2.rotate_queries_or_keys, position), places)
    assert spread > 1, "scores at one offset should agree, if it were relative"
    x = torch.randn(1, 1, 12, DIM, dtype=torch.float64)
    ratio = vjepa2.rotate_queries_or_keys(x, position).norm(dim=-1) / x.norm(dim=-1)
    assert (ratio - 1).abs().max() > 0.02, "it is no rotation"

    source = inspect.getsource(vjepa2.rotate_queries_or_keys)
    assert source.count(".repeat(1, 1, 1, 2)") == 2
    namespace = dict(vars(vjepa2))
    exec(source.replace(".repeat(1, 1, 1, 2)", ".repeat_interleave(2, -1)"), namespace)
    spread, overall = offset_spread(vjepa2_scores(namespace["rotate_queries_or_keys"], position), places)
    assert spread < 1e-9 < 1 < overall


def test_offset_spread_sees_a_table_that_is_not_relative() -> None:
    """The measure used above: exact for a relative score, large for one that looks at the place itself."""
    places = patch_positions(4, 3)
    relative = -torch.cdist(places, places)
    assert offset_spread(relative, places)[0] < 1e-9
    assert offset_spread(relative + places.sum(1), places)[0] > 1
