# ruff: noqa: E501
"""Break the code on purpose, one way at a time, and see that a test notices.

    python tests/mutants.py             all of them, two at a time; exits 1 if one survives
    python tests/mutants.py ema hooks   those with one of these words in their name

Each mutant is one replacement in a temporary copy of the package; the test file that should catch it runs there with
-x. A failing test (pytest's exit code 1) is a catch; a copy that cannot be imported or collected is not, nor is a
replacement whose text is no longer in the source. One copy stays unchanged, and there all these files must pass.

Not covered: breaking several things at once, and mutants made by chance.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {ROOT, ROOT / "tests"}
# Slow imports, done once: each mutant is a fork of a process that has them and has not seen hjepa.
PRELOADED = ("torch", "timm", "hypothesis", "safetensors.torch", "sklearn.linear_model", "sklearn.decomposition",
             "omegaconf", "threadpoolctl", "torch._functorch.eager_transforms")  # fmt: skip
MARKERS = ("-o", "markers=slow")  # conftest.py has it otherwise
UNREWRITTEN = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # hypothesis is loaded before pytest starts


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in hjepa/`module`.py; test_`tests`.py below tests/ should fail."""

    name: str
    module: str
    old: str
    new: str
    tests: str


CONJUGATE = "table * table.new_tensor([1.0, -1.0])"
SEEN = "~_any_in_cell(seen, level)"
MUTANTS = [
    # the rotation
    Mutant("no rotation", "nn/rope", "self.angles(positions, grid_size, layer)\n", "0 * self.angles(positions, grid_size, layer)\n", "rope"),
    Mutant("attention without rotation", "nn/attention", "= heads(attn, x, table, prefix)", "= heads(attn, x, None, prefix)", "attention"),
    Mutant("sign of k", "nn/rope", "rotate(q, table), rotate(k, table)", f"rotate(q, table), rotate(k, {CONJUGATE})", "rope"),
    Mutant("swapped axes", "nn/frequencies", "torch.stack((torch.cat((omega, zero)), torch.cat((zero, omega))))", "torch.stack((torch.cat((zero, omega)), torch.cat((omega, zero))))", "rope"),
    Mutant("wrong frequencies", "nn/frequencies", "device=device) / (dim // 4)", "device=device) / (dim // 2)", "rope"),
    Mutant("all fixed directions alike", "nn/frequencies", "i * GOLDEN %", "0 * i %", "rope"),
    Mutant("shifted index", "nn/frequencies", "torch.arange(height,", "torch.arange(1, height + 1,", "rope"),
    Mutant("CLS rotated", "nn/rotation", "rows = qkv[:, prefix:,", "rows = qkv[:, : qkv.shape[1] - prefix,", "attention"),
    Mutant("positions not gathered", "nn/rope", "return table[0][index]", "return table[:, : index.shape[1]].expand(len(index), -1, -1, -1, -1)", "rope"),
    Mutant("table in bfloat16", "nn/rope", "* self.magnitude(grid_size)\n", "* self.magnitude(grid_size)\n            table = table.bfloat16().float()\n", "rope_module"),
    Mutant("strategy ignored", "nn/rope", "rescaled(base, self.strategy,", 'rescaled(base, "extrapolate",', "rope"),
    Mutant("strategy left out of the cache's key", "nn/rope", "*options, self.strategy, str(device))", "*options, str(device))", "rope"),
    Mutant("no half-patch offset", "nn/frequencies", "((scaled - base) / 2).sum(0)", "((scaled - base) / 2).sum(0) * 0", "rope"),
    Mutant("no temperature under ntk_by_parts", "nn/frequencies", "1 + 0.05 *", "1 + 0 *", "rope"),
    Mutant("table of inference mode cached", "nn/rope", "with torch.inference_mode(False):", "if True:", "rope_module"),
    Mutant("learned theta taken for a constant", "nn/rope", "self.log_theta[which].float()", "self.log_theta[which].detach().float()", "rope_module"),
    Mutant("gradient turned the wrong way", "nn/rotation", "torch.view_as_complex(table).conj()", "torch.view_as_complex(table)", "attention_module"),
    Mutant("second derivative turned the wrong way", "nn/rotation", "[1.0, -1.0]", "[1.0, 1.0]", "attention_module"),
    Mutant("gradient in half precision turned the wrong way", "nn/fused", "-1.0 if back else 1.0", "1.0", "fused"),
    Mutant("a kernel that is wrong is used", "nn/fused", "if error <= 2 * torch", "if error <= 2e9 * torch", "fused"),
    Mutant("hooks see rotated values", "nn/attention", "not _hooked(linear) and ", "", "attention_module"),
    Mutant("attention mask ignored", "nn/attention", "attn_mask=attn_mask, dropout_p", "attn_mask=None, dropout_p", "attention"),
    # encoders
    Mutant("prefix always one token", "nn/encoders", "add_rope(block, rope, layer, self.num_prefix_tokens)", "add_rope(block, rope, layer, min(1, self.num_prefix_tokens))", "encoders"),
    Mutant("norm_pre dropped", "nn/encoders", "        x = self.vit.norm_pre(x)\n", "", "encoders"),
    Mutant("surplus tokens attended to", "nn/encoders", "attn_mask = ~keys[:, None, None, :]", "attn_mask = None", "context"),
    Mutant("coordinates augmented in eval mode", "nn/vit", "self.training and self.rope.augments", "self.rope.augments", "context"),
    Mutant("ALiBi's heads all alike", "nn/alibi", "/ self.num_heads)\n", "/ self.num_heads) * 0 + 0.25\n", "alibi"),
    Mutant("ALiBi lost beside a mask", "nn/alibi", "    return bias + attn_mask", "    return attn_mask", "alibi"),
    Mutant("ALiBi in a picture of another size", "nn/alibi", "if self.strategy == \"interpolate\":", "if False:", "alibi"),
    # the target
    Mutant("EMA the wrong way round", "nn/encoders", "for n in floats], 1 - momentum)", "for n in floats], momentum)", "target"),
    Mutant("EMA momentum does not rise", "nn/encoders", "min(max(step / self.ema_steps, 0.0), 1.0)", "0.0", "target"),
    Mutant("EMA leaves buffers out", "nn/encoders", "[*module.named_parameters(), *module.named_buffers()]", "module.named_parameters()", "target"),
    Mutant("target not a copy", "nn/encoders", "    target.load_state_dict(context.state_dict())\n", "", "target"),
    Mutant("target in training mode", "nn/encoders", "super().train(False)", "super().train(mode)", "target"),
    # masks
    Mutant("context keeps target patches", "nn/masks", "generator) & ~hidden", "generator)", "masks"),
    Mutant("coarse targets that the context sees into", "nn/masks", SEEN, "_any_in_cell(hidden, level)", "masks"),
    Mutant("masks beside the seed", "nn/masks", "torch.rand(allowed.shape, generator=generator)", "torch.rand(allowed.shape)", "masks"),
    Mutant("starved masks not drawn again", "nn/masks", "for _ in range(DRAWS):\n            scale,", "for _ in range(1):\n            scale,", "masks"),
    Mutant("later masks short of tokens are kept", "nn/masks", "enough = enough & has", "enough = enough", "masks"),
    Mutant("all blocks of masks from one draw", "nn/masks", "self.draw(block, min(", "self.draw(0, min(", "masks"),
    # what people hand in
    Mutant("folders of splits taken for classes", "data/folder", "    splits = _split_folders(folder)\n", "    splits: dict = {}\n", "imagefiles"),
    Mutant("splits inside classes mixed", "data/folder", "if len(splits) > 1:\n            what = f\"class", "if False:\n            what = f\"class", "imagefiles"),
    Mutant("index: a stale one trusted", "data/index", "if check and any(os.stat", "if False and any(os.stat", "index"),
    Mutant("index: a fresh one trusted", "data/index", "if check and max(stamps", "if False and max(stamps", "index"),
    Mutant("index: a damaged one trusted", "data/index", "!= zlib.crc32(raw[8:].data)", "== -1", "index"),
    Mutant("index: nested folders not watched", "data/folder", "stamps.setdefault(str(folder / below),", "below or stamps.setdefault(str(folder / below),", "index"),
    Mutant("index: validation pictures among the first", "data/index", 'order = np.argsort(held, kind="stable")', "order = np.arange(len(held))", "index"),
    Mutant("masks of the wrong rows", "train/feed", "masks.rows(rows, views)", "masks.rows(slice(0, len(keys)), views)", "index"),
    # pooling, predictor, loss
    Mutant("pooling on the transposed grid", "nn/hjepa", "patches.unflatten(1, grid_size)", "patches.unflatten(1, grid_size[::-1])", "model"),
    Mutant("border cells cut off", "nn/hjepa", "ceil_mode=True", "ceil_mode=False", "model"),
    Mutant("cell at its corner", "nn/hjepa", "pool_to_level(positions[None], grid_size, level)[0]", "pool_to_level(positions[None], grid_size, level)[0].floor()", "model"),
    Mutant("targets not normed", "nn/hjepa", "F.layer_norm(patches, patches.shape[-1:])", "patches", "model"),
    Mutant("level weights ignored", "nn/hjepa", "losses.new_tensor(self.level_weights)", "torch.ones_like(losses)", "model"),
    Mutant("predictor without places", "nn/predictor", "self.rope.tables(grid, positions=positions)", "self.rope.tables(grid, positions=0 * positions)", "predictor"),
    Mutant("fractions rounded away", "nn/predictor", "*query_positions), dim=1).float()", "*query_positions), dim=1).float().round()", "predictor"),
    # views
    Mutant("views not antialiased", "data/views", "step.clamp(min=1)", "torch.ones_like(step)", "views"),
    Mutant("mirrored views keep their places", "data/views", "1 - columns / grid[1], columns", "columns / grid[1], columns", "views"),
    Mutant("width of filters not used", "data/views", " * wider[:, None, None])", ")", "views"),
    Mutant("width of filters not drawn", "build", "filter_width=options.filter_width", "filter_width=(1.0, 1.0)", "views"),
    Mutant("crops leave the picture", "data/views", "top * (1 - height), left * (1 - width)", "top, left", "views"),
    Mutant("grey views keep their colour", "data/views", "masked_fill(chance < grey, 0.0)", "masked_fill(chance < 0, 0.0)", "views"),
    Mutant("a view compared with itself", "nn/losses", 'scores = scores.masked_fill(itself, float("-inf"))', "pass", "losses"),
    Mutant("only one positive counts", "nn/losses", ".sum(1) / positive.sum(1)", ".max(1).values", "losses"),
    Mutant("sketch without its sine", "nn/losses", " + phase.sin().mean(0).square()", "", "losses"),
    # training
    Mutant("bfloat16 that is emulated", "train/loop", "amx or (narrow and not newer)", "not newer", "precision"),
    Mutant("bfloat16 where AMX is missing", "train/loop", "amx or (narrow and not newer)", "amx or narrow", "precision"),
    Mutant("bfloat16 where one of its instructions is enough", "train/loop", "amx or (narrow and not newer)", "narrow and not newer", "precision"),
    Mutant("bfloat16 that a GPU emulates", "train/loop", "including_emulation=False", "including_emulation=True", "precision"),
    Mutant("whitening: nothing added", "train/whitening", "weight = axes / (variances + added).sqrt()[:, None]", "weight = axes / variances.sqrt()[:, None]", "whitening"),
    Mutant("whitening: the layer is trained on", "train/whitening", "proj.requires_grad_(False)", "proj.requires_grad_(True)", "whitening"),
    Mutant("whitening: the target keeps a random layer", "train/loop", "self.unwrapped.target_encoder.copy_from_context_encoder(context)", "context.eval()", "whitening"),
    Mutant("labels of other pictures", "nn/hjepa", "labels.repeat(len(scores)", "labels.repeat_interleave(len(scores)", "feed"),
    Mutant("labels teach the classifier alone", "nn/hjepa", "scores = self.classifier(features)", "scores = self.classifier(features.detach())", "feed"),
    Mutant("labels teach nothing", "nn/hjepa", "F.cross_entropy(scores,", "F.cross_entropy(scores.detach().requires_grad_(),", "feed"),
    Mutant("crops counted from where a run went on", "train/feed", "draw_views(self.config, step)", "draw_views(self.config, step - self.steps[0])", "feed"),
    Mutant("an optimiser that forgets where it was", "train/loop", "load_checkpoint(self.last_good, self.unwrapped, self.optimizer.optimizer)", "load_checkpoint(self.last_good, self.unwrapped)", "feed"),
    Mutant("a run that goes on a step too late", "train/loop", "return state[\"step\"]", "return state[\"step\"] + 1", "feed"),
    Mutant("a picture twice in a batch across two epochs", "train/schedule", "    order[twice], order[free] = order[free], order[twice]\n", "", "schedule"),
    Mutant("batches across epochs as drawn", "train/feed", 'apart=self.config.objective in ("views", "both")', "apart=False", "feed"),
    Mutant("half B read by default", "experiments/transfer", 'split: str = "test",', 'split: str = "test-b",', "halves"),
    Mutant("half B read by another name", "build", "        split,\n        root", '        FINAL.get(options.name, split),\n        root', "halves"),
    Mutant("half A with half B in it", "data/sources", 'if in_second == (request.split == "test-b")', 'if in_second >= (request.split == "test-b")', "halves"),
    # evaluation
    Mutant("prefix tokens in the pooled features", "evaluate/transfer", '"num_prefix_tokens", 0) :]', '"num_prefix_tokens", 0) * 0 :]', "evaluate"),
    Mutant("rows of another evaluation taken over", "evaluate/resume", " and before.get(\"key\") == key", "", "resume"),
    Mutant("a fingerprint without weights", "evaluate/resume", "            digest.update(tensor.detach()", "            (tensor.detach()", "resume"),
    Mutant("readers of a resumed evaluation fitted nowhere", "evaluate/transfer", "dict.fromkeys([home, *left])", "dict.fromkeys(left)", "resume"),
    Mutant("encoders left where they are", "evaluate/transfer", "            module_of(encoder).to(device)\n", "            pass\n", "evaluate"),
    Mutant("nearest by dot product", "evaluate/readers", "known, asked = F.normalize(gallery - mean, dim=1), F.normalize(queries - mean, dim=1)", "known, asked = gallery - mean, queries - mean", "metrics"),
    Mutant("moved pictures that hang over the border", "data/moved", "round(place.left * (width - side))", "round(place.left * width)", "moved"),
    Mutant("all repeats in one place", "data/moved", "placement(id_, repeat) for", "placement(id_, 0) for", "moved"),
    Mutant("placements drawn as pictures of their own", "evaluate/transfer", "groups=shown.picture)", "groups=None)", "shown"),
    Mutant("placements left out one by one", "evaluate/transfer", "seed, shown.picture if shown.placements > 1 else None)", "seed, None)", "shown"),
    Mutant("placements chosen one by one", "evaluate/shown", "subset(len(number), count, seed)", "subset(len(picture), count, seed)", "shown"),
    Mutant("a picture found by another placement", "evaluate/readers", "if turn is not None and len", "if False and len", "shown"),
    Mutant("tables of several numbers of placements", "evaluate/results", "if len(numbers) > 1:", "if False:", "shown"),
    Mutant("a picture among its own neighbours", "evaluate/readers", ".fill_diagonal_(-math.inf)", "", "baselines"),
    Mutant("colours left normalised", "evaluate/baselines", "(images.cpu() * scale + shift)", "images", "baselines"),
    Mutant("pictures counted as if seeds shared none", "evaluate/primary", "seeds_part + pictures_part - rest_part", "seeds_part", "primary"),
    Mutant("Holm's steps in the wrong order", "evaluate/primary", "np.argsort(p)", "np.argsort(-p)", "primary"),
    Mutant("rows and columns of a patch swapped", "evaluate/dense", "torch.meshgrid(rows, columns, indexing=\"ij\")", "torch.meshgrid(rows, columns, indexing=\"xy\")", "dense"),
    Mutant("own place counted in patches of the other size", "evaluate/dense", "offset * torch.tensor(home_grid)", "offset * torch.tensor(grid_size)", "dense"),
    Mutant("features of neighbours not centred", "evaluate/readers", "mean = gallery.mean(dim=0)", "mean = 0", "metrics"),
    Mutant("weakest penalty, not the strongest", "evaluate/readers", "(share >= best - math", "(share >= best - 0 * math", "metrics"),
    Mutant("a picture of a later chunk among its own neighbours", "evaluate/readers", "similarity[:, first:].fill", "similarity[:, 0 * first :].fill", "metrics"),
    Mutant("a chunk of queries too many", "evaluate/readers", "max(1, ENTRIES // max(1, len(gallery)))", "1 + ENTRIES // max(1, len(gallery))", "metrics"),
    Mutant("a probe left around its old mean", "evaluate/readers", "intercept=self.intercept + (self.centre - centre)", "intercept=self.intercept + 0 * (self.centre - centre)", "metrics"),
    Mutant("neighbours left around the old mean", "evaluate/transfer", "moved = x + (x_train", "moved = x + 0 * (x_train", "evaluate"),
    Mutant("a row's own leverage left in", "evaluate/readers", "fall = -2 * (", "fall = -1 * (", "metrics"),
    Mutant("leverage of the intercept forgotten", "evaluate/readers", " + 1 / len(z))", ")", "metrics"),
    Mutant("normal quantile for ten groups", "evaluate/measures", "float(stdtrit(len(parts) - 1, 0.975))", "1.96", "metrics"),
    Mutant("effective rank not centred", "evaluate/measures", "centred = x - x.mean(dim=0)", "centred = x", "metrics"),
    Mutant("covariance left out", "nn/losses", " + off_diagonal / features.shape[1]", "", "model"),
    Mutant("shares joined in another order", "evaluate/processes", "for part in parts for batch", "for part in reversed(parts) for batch", "sharing"),
    # published encoders
    Mutant("published: pixels as the data has them", "evaluate/published", "forward_features(images * self.scale + self.offset)", "forward_features(images)", "published"),
    Mutant("published: another pooling", "evaluate/published", "self.model.forward_head(tokens, pre_logits=True)", "tokens.mean(1)", "published"),
    Mutant("published: half a file is enough", "evaluate/published", "    if wrong:\n", "    if False:\n", "published"),
    Mutant("published: any size goes", "evaluate/published", "if not self.any_size and pixels", "if False and pixels", "published"),
    # the dry run
    Mutant("dry run: forward alone", "train/estimate", "            loss = model(**arguments).loss\n", "            loss = model(**arguments).loss.detach().requires_grad_()\n", "estimate"),
    Mutant("dry run: the ring sends all of it", "train/estimate", "2 * (processes - 1) / processes * gradients", "2 * (processes > 1) * gradients", "estimate"),
    # checkpoints
    Mutant("verify trusts what was read before", "train/checkpoint", "    _HASHED.clear()\n", "", "verify"),
    Mutant("a file written anew keeps its digest", "train/checkpoint", "found.st_size, found.st_mtime_ns", "found.st_size", "verify"),
    # one's own pictures
    Mutant("a retired key read whatever it says", "config", "if value == RETIRED[key]:", "if True:", "config"),
    Mutant("neighbours of features not centred", "evaluate/collection", "features.double() - features.double().mean(0)", "features.double()", "collection"),
    Mutant("a picture is its own neighbour", "evaluate/collection", ".fill_diagonal_(-2)", "", "collection"),
    Mutant("sine-cosine code of another base", "nn/frequencies", "theta: float = 10000.0) -> Tensor:", "theta: float = 1000.0) -> Tensor:", "encoders"),
    Mutant("sine-cosine embedding trained", "nn/encoders", "embedding.requires_grad_(False)", "embedding.requires_grad_(True)", "encoders"),
    Mutant("repeated patches on a device unnoticed", "nn/checks", "(inside & once).all()", "inside.all()", "context"),
]  # fmt: skip


def applies(mutant: Mutant) -> bool:
    """Whether the text to replace is in the source exactly once."""
    return (ROOT / "hjepa" / f"{mutant.module}.py").read_text().count(mutant.old) == 1


def run_tests(mutant: Mutant | None, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and last line on a copy of the package, mutated or not. Once per process: it imports hjepa."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("hjepa", "tests", "configs", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "docs").mkdir()
        for page in (ROOT / "docs").glob("*.md"):  # some tests run the code of a page
            shutil.copy(page, copy / "docs")
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            source = copy / "hjepa" / f"{mutant.module}.py"
            source.write_text(source.read_text().replace(mutant.old, mutant.new))
        files = [next(copy.glob(f"tests/**/test_{name}.py")).relative_to(copy).as_posix() for name in tests]
        sys.path[:] = [str(copy), str(copy / "tests"), *(entry for entry in sys.path if Path(entry or ".").resolve() not in OURS)]
        sys.dont_write_bytecode = True
        os.chdir(copy)
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # tests start processes
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*files, "-x", "-q", "-p", "no:cacheprovider", "--noconftest", *MARKERS, *UNREWRITTEN])
        os.chdir(ROOT)
    return int(code), next((line for line in reversed(said.getvalue().splitlines()) if line.strip()), "no output")


def judge(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant was caught, and a line that says so."""
    started = time.perf_counter()
    if not applies(mutant):
        return False, f"GONE      {mutant.name}: the text is not in hjepa/{mutant.module}.py exactly once"
    code, last = run_tests(mutant, [mutant.tests])
    word = {0: "SURVIVED", 1: "caught"}.get(code, "BROKEN")
    return code == 1, f"{word:9} {mutant.name} (test_{mutant.tests}.py, {time.perf_counter() - started:.0f} s) {last}"


def main(words: list[str]) -> int:
    """Judge the mutants, print a line for each, return the exit code."""
    chosen = [m for m in MUTANTS if not words or any(word.lower() in m.name.lower() for word in words)]
    if not chosen:
        print(f"no mutant has one of these words in its name: {' '.join(words)}")
        return 2
    for name in PRELOADED:
        importlib.import_module(name)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        unchanged = pool.apply_async(run_tests, (None, sorted({m.tests for m in chosen})))
        verdicts, lines = [], pool.imap(judge, chosen, chunksize=1)
        for _ in chosen:
            caught, line = lines.next(timeout=600)  # a crashed process would never answer
            verdicts.append(caught)
            print(line, flush=True)
        code, last = unchanged.get(timeout=600)
    print(f"{'passed' if code == 0 else 'FAILED':9} unchanged copy: {last}")
    print(f"{sum(verdicts)} of {len(verdicts)} mutants caught")
    return 0 if all(verdicts) and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
