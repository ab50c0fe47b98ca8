"""The report's claims about RoPE in an H-JEPA, one test each, named after the claim in `results/claims.json`.

A test measures its claim afresh and holds the ledger's numbers to it; where the ledger quotes a committed result, the
row is rebuilt from that file. `docs/claims.md` is the ledger as a page.
"""

from pathlib import Path

import pytest
import timm
import torch
from formulas import attention, axial_angles, offset_spread, patch_positions
from torch import Tensor, nn

from benchmarks import ledger
from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.encoders import ContextEncoder, create_encoder
from hjepa.nn.hjepa import HJEPA
from hjepa.nn.masks import sample_masks
from hjepa.nn.predictor import Predictor
from hjepa.nn.rope import VisionRoPE2D

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ledger.read(ROOT)
SMALL = dict(patch_size=8, embed_dim=48, depth=2, num_heads=4, class_token=False)


def small(img_size: int | tuple[int, int] = 64, use_absolute: bool = False, **vit: object) -> ContextEncoder:
    torch.manual_seed(0)
    options = dict(use_absolute=use_absolute, vit=SMALL | vit)
    encoder = ContextEncoder("vit_tiny_patch16_224", img_size, False, True, 100.0, **options)  # type: ignore[arg-type]
    with torch.no_grad():  # sharper attention and larger biases than at the start of training: nothing hides
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "qkv" in name else 0.02))
    return encoder.eval()


def check(claim: str, **measured: float) -> None:
    ledger.check(LEDGER[claim], measured)


def saved_bytes(encoder: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, each storage once, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder(images)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def parameters(name: str, **options: object) -> int:
    with torch.device("meta"):  # counted, not allocated
        return sum(p.numel() for p in ContextEncoder(name, **options).parameters())  # type: ignore[arg-type]


# cost


def test_forward_overhead() -> None:
    assert LEDGER["forward_overhead"] == ledger.forward_overhead(LEDGER["forward_overhead"], ROOT), ledger.STALE


def test_training_overhead() -> None:
    assert LEDGER["training_overhead"] == ledger.training_overhead(LEDGER["training_overhead"], ROOT), ledger.STALE


def test_saved_memory() -> None:
    plain, rotary = (ContextEncoder("vit_small_patch16_224", use_rope=rope) for rope in (False, True))
    table = 14 * 14 * 64 * 4  # cosine and sine of 32 pairs, one float32 table for all layers
    for images in (torch.randn(2, 3, 224, 224), torch.randn(1, 3, 224, 224)):
        off, on = saved_bytes(plain, images), saved_bytes(rotary, images)
        assert on - off == table
    check("saved_memory", kilobytes=table / 1000, percent=100 * (on / off - 1))


def test_parameters_added() -> None:
    added = parameters("vit_base_patch16_224", use_rope=True) - parameters("vit_base_patch16_224")
    check("parameters_added", added=added)


def test_vit_b_size() -> None:
    encoder = parameters("vit_base_patch16_224", use_rope=True)
    classifier = 768 * 1000 + 1000
    check("vit_b_size", millions=encoder / 1e6, with_classifier=(encoder + classifier) / 1e6)


# structure


@torch.no_grad()
def test_dynamic_resolution() -> None:
    encoder, worst = small(), 0.0
    for height, width in ((32, 32), (96, 160), (128, 512)):
        images = torch.randn(2, 3, height, width)
        tokens = encoder(images)
        true = patch_positions(height // 8, width // 8).float()
        worst = max(worst, float((tokens - encoder(images, positions=true)).abs().max()))
        native = small((height, width))
        native.load_state_dict(encoder.state_dict())
        worst = max(worst, float((tokens - native(images)).abs().max()))
    guessed = patch_positions(32, 32).float()  # the grid that sqrt(N) gives for 16 x 64 patches, a silent mistake
    assert (tokens - encoder(images, positions=guessed)).abs().max() > 1e-2
    check("dynamic_resolution", difference_below=worst)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_tokens(prefix: int) -> None:
    torch.manual_seed(prefix)
    attn = timm.layers.Attention(32, num_heads=2, qkv_bias=True).double()
    rope = VisionRoPE2D(16, num_patches_per_side=4, theta=100.0)
    x = torch.randn(2, prefix + 12, 32, dtype=torch.float64)
    ours = RoPEAttentionWrapper(attn, rope, num_prefix_tokens=prefix)(x, table=rope.table((3, 4)))
    angles = axial_angles(patch_positions(3, 4), 16, 100.0)
    error = (ours - attention(x, attn.state_dict(), 2, angles, prefix)).abs().max()
    check("prefix_tokens", error_below=float(error))


@torch.no_grad()
def test_prefix_tokens_of_every_kind_of_vit() -> None:
    kinds = {0: SMALL, 1: SMALL | {"class_token": True}, 5: SMALL | {"class_token": True, "reg_tokens": 4}}
    for prefix, options in kinds.items():
        encoder = small(**options)
        assert encoder.num_prefix_tokens == prefix
        assert encoder(torch.randn(1, 3, 96, 64)).shape == (1, prefix + 96, 48)
    distilled = ContextEncoder("deit_tiny_distilled_patch16_224", 32, use_rope=True)
    assert distilled(torch.randn(1, 3, 32, 48)).shape == (1, 2 + 6, 192)


@torch.no_grad()
def test_old_checkpoints() -> None:
    encoders = {rope: ContextEncoder("vit_tiny_patch16_224", 32, use_rope=rope).eval() for rope in (False, True)}
    off, on = (encoder.state_dict() for encoder in encoders.values())
    timm_keys = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict().keys()
    strange = off.keys() ^ on.keys() | {f"vit.{key}" for key in timm_keys} ^ on.keys()
    images = torch.randn(1, 3, 32, 32)
    before = encoders[False](images)
    encoders[True].load_state_dict(off)
    assert not torch.allclose(encoders[True](images), before)  # the same weights, another function
    encoders[False].load_state_dict(encoders[True].state_dict())
    change = (encoders[False](images) - before).abs().max()
    check("old_checkpoints", keys=len(on), strange=len(strange), change=float(change))
    stored = {tensor.untyped_storage().data_ptr() for tensor in on.values()}
    assert len(stored) == len(on), "a weight is stored twice"
    learned = ContextEncoder("vit_tiny_patch16_224", 32, use_rope=True, rope={"learnable": True})
    assert learned.state_dict().keys() - off.keys() == {"rope.log_theta"}  # the exception that the verdict names


@torch.no_grad()
def test_ema() -> None:
    steps = 20
    context, target = create_encoder("vit_tiny_patch16_224", 64, vit=SMALL, ema_steps=steps)
    start = target.vit.norm.bias.double().clone()
    expected, momenta = start.clone(), []
    for step in range(steps + 1):
        with torch.no_grad():
            context.vit.norm.bias.add_(torch.randn(48))
        m = target.update_from_context_encoder(context, step)
        momenta.append(m)
        expected = m * expected + (1 - m) * context.vit.norm.bias.detach().double()
    straight = [0.996 + 0.004 * step / steps for step in range(steps + 1)]
    assert momenta == pytest.approx(straight, abs=1e-12)
    assert not torch.allclose(expected, start, atol=1e-3)
    error = (target.vit.norm.bias.double() - expected).abs().max()
    check("ema", first=momenta[0], last=momenta[-1], error_below=float(error))


def small_model() -> HJEPA:
    torch.manual_seed(0)
    options = dict(use_rope=True, rope_theta=100.0, use_absolute=False)
    context, target = create_encoder("vit_tiny_patch16_224", 64, vit=SMALL, **options)  # type: ignore[arg-type]
    predictor = Predictor(48, 48, 2, 4, levels=3, grid_size=(8, 8), **options)  # type: ignore[arg-type]
    return HJEPA(context, target, predictor).double()


def test_gradient_flow() -> None:
    model = small_model()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    masks = sample_masks(4, (8, 8), levels=3, generator=torch.Generator().manual_seed(0))
    model(images, masks).loss.backward()
    trained = [p for part in (model.context_encoder, model.predictor) for p in part.parameters() if p.requires_grad]
    starved = [p for p in trained if p.grad is None or p.grad.norm() == 0]
    stray = [p for p in model.target_encoder.parameters() if p.grad is not None]
    worst, step = 0.0, 1e-4
    for p in trained[:: len(trained) // 8]:
        length = float(p.grad.norm())  # type: ignore[union-attr]
        direction, losses = p.grad / length, []  # type: ignore[operator]  # the loss rises along it by `length`
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * step * direction)
                losses.append(float(model(images, masks).loss))
                p.sub_(sign * step * direction)
        worst = max(worst, abs((losses[0] - losses[1]) / (2 * step) / length - 1))
    check("gradient_flow", starved=len(starved), in_target=len(stray), error_below=worst)


def test_a_keys_bias_has_a_gradient_only_where_positions_rotate() -> None:
    """Without rotation it adds the same to all scores of a query, and softmax does not see it."""
    lengths = {}
    for use_rope in (False, True):
        torch.manual_seed(0)
        how = dict(use_rope=use_rope, rope_theta=100.0, use_absolute=not use_rope, vit=SMALL)
        context, target = create_encoder("vit_tiny_patch16_224", 64, **how)  # type: ignore[arg-type]
        model = HJEPA(context, target, Predictor(48, 48, 2, 4, levels=3, grid_size=(8, 8))).double()
        masks = sample_masks(4, (8, 8), levels=3, generator=torch.Generator().manual_seed(0))
        model(torch.randn(4, 3, 64, 64, dtype=torch.float64), masks).loss.backward()
        query, key, _ = context.vit.blocks[0].attn.qkv.bias.grad.chunk(3)  # type: ignore[union-attr]
        lengths[use_rope] = float(key.norm() / query.norm())
    assert lengths[False] < 1e-9 and lengths[True] > 1e-3


# positions


def scores(rope: VisionRoPE2D, side: int) -> Tensor:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, rope.dim, dtype=torch.float64).expand(-1, -1, -1, side * side, -1)
    q, k = rope(q, k)
    return (q @ k.transpose(-2, -1))[0, 0]


def moved(encoder: ContextEncoder) -> float:
    """How much tokens change, relative to their size, when everything is moved by three patches on the grid."""
    torch.manual_seed(0)
    patch = torch.randn(2, 3, 40, 40)
    places = [torch.zeros(2, 3, 64, 64) for _ in range(2)]
    places[0][..., :40, :40], places[1][..., 24:, 24:] = patch, patch
    grid = torch.arange(64).view(8, 8)
    index = [grid[:5, :5].reshape(1, -1).expand(2, -1), grid[3:, 3:].reshape(1, -1).expand(2, -1)]
    first, second = (encoder(x, i) for x, i in zip(places, index, strict=True))
    return float((second - first).norm() / first.norm())


@torch.no_grad()
def test_relative_positions() -> None:
    spread, overall = offset_spread(scores(VisionRoPE2D(64, num_patches_per_side=6), 6), patch_positions(6, 6))
    assert overall > 1
    alone, hybrid, with_cls = moved(small()), moved(small(use_absolute=True)), moved(small(class_token=True))
    assert min(hybrid, with_cls) > 1e-3, "the verdict's conditions would be idle"
    check("relative_positions", spread_below=spread, moved_below=alone)


@torch.no_grad()
def test_axial() -> None:
    table = scores(VisionRoPE2D(64, num_patches_per_side=6), 6)[0].view(6, 6)  # score of the first patch with (dy, dx)
    mixed = table - table[:1] - table[:, :1] + table[0, 0]  # zero where the score is f(dy) + g(dx)
    assert table.std() > 0.5
    check("axial", cross_term_below=float(mixed.abs().max()))


def vjepa2(x: Tensor, place: Tensor, interleave: bool) -> Tensor:
    """V-JEPA 2's rotation along one axis: angles laid out for pairs (i, i + D/2), values paired (2i, 2i+1)."""
    size = x.shape[-1]
    angle = place[:, None] * 10000.0 ** -(torch.arange(size // 2, dtype=x.dtype) / (size / 2))
    angle = angle.repeat_interleave(2, -1) if interleave else angle.repeat(1, 2)
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * angle.cos() + turned * angle.sin()


def test_matches_vjepa2() -> None:
    from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

    place = torch.arange(14, dtype=torch.float64)
    places = torch.stack((place, torch.zeros_like(place)), dim=-1)
    many = torch.randn(1, 1, 14, 20, dtype=torch.float64)
    torch.testing.assert_close(vjepa2(many, place, False), rotate_queries_or_keys(many, place), atol=1e-6, rtol=0)
    token = torch.full((14, 20), 20**-0.5, dtype=torch.float64)  # query = key of length 1; 20 as in a head of 64
    turned = {interleave: vjepa2(token, place, interleave) for interleave in (False, True)}
    spread = {interleave: offset_spread(x @ x.T, places)[0] for interleave, x in turned.items()}
    lengths = turned[False].norm(dim=-1)
    assert lengths.min() < 0.95 and lengths.max() > 1.05, "it keeps lengths, as a rotation does"
    check("matches_vjepa2", theirs=spread[False], repaired_below=spread[True])


# transfer


def test_better_transfer() -> None:
    assert LEDGER["better_transfer"] == ledger.better_transfer(LEDGER["better_transfer"], ROOT), ledger.STALE
