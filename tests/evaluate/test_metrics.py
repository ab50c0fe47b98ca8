"""Readers and measures on constructed features with known answers."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier, RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from hjepa.evaluate import readers
from hjepa.evaluate.measures import (
    bootstrap_interval,
    effective_rank,
    feature_std,
    jackknife_interval,
    linear_cka,
    one_thread,
    symmetric_eigen,
)
from hjepa.evaluate.readers import (
    PENALTIES,
    knn_accuracy,
    leave_one_out_knn,
    linear_probe,
    probe_hits,
    retrieval_hits,
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _clusters(n: int, seed: int, spread: float = 1.0):
    """n points around five planted centres in 8 dimensions, with their labels."""
    g = _generator(99)
    centres = torch.randn(5, 8, generator=g)
    g.manual_seed(seed)
    labels = torch.randint(5, (n,), generator=g)
    return centres[labels] + spread * torch.randn(n, 8, generator=g), labels


def _knn_by_loops(gallery, gallery_labels, queries, k, temperature):
    mean = gallery.double().mean(0)
    gallery, queries = gallery.double() - mean, queries.double() - mean
    guesses = []
    votes: dict[int, float]
    for query in queries.double().numpy():
        scored = []
        for row, label in zip(gallery.double().numpy(), gallery_labels.tolist(), strict=True):
            cosine = (query @ row) / (np.linalg.norm(query) * np.linalg.norm(row))
            scored.append((cosine, label))
        votes = {}
        for cosine, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        guesses.append(max(votes, key=votes.__getitem__))
    return torch.tensor(guesses)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (10, 1.0), (60, 0.07)])
def test_knn_equals_brute_force_loops(k, temperature):
    gallery, gallery_labels = _clusters(60, 0)
    queries, labels = _clusters(40, 1)
    expected = _knn_by_loops(gallery, gallery_labels, queries, k, temperature) == labels
    assert 5 < expected.sum() < 40  # the case can tell right from wrong
    assert torch.equal(knn_accuracy(gallery, gallery_labels, queries, labels, k, temperature), expected)


def test_knn_and_probe_find_separated_clusters_perfectly():
    x, y = _clusters(200, 0, spread=0.05)
    queries, labels = _clusters(100, 1, spread=0.05)
    assert knn_accuracy(x, y, queries, labels).all()
    assert probe_hits(linear_probe(x, y), queries, labels).all()


def test_knn_and_probe_are_at_chance_on_random_labels():
    g = _generator(0)
    x, queries = torch.randn(1000, 16, generator=g), torch.randn(2000, 16, generator=g)
    y, labels = torch.randint(4, (1000,), generator=g), torch.randint(4, (2000,), generator=g)
    for hits in (knn_accuracy(x, y, queries, labels), probe_hits(linear_probe(x, y), queries, labels)):
        assert abs(hits.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_knn_refuses_more_neighbours_than_pictures():
    x, y = _clusters(5, 0)
    with pytest.raises(ValueError, match=r"k=6 .* allows 1 to 5"):
        knn_accuracy(x, y, x, y, k=6)


@pytest.mark.parametrize("entries", [60 * 7, 60 * 39 + 1, 1])
def test_neighbours_read_in_chunks_of_queries_are_those_read_at_once(monkeypatch, entries):
    """Chunks that divide the queries, that do not, and of one query; never more similarities at once than allowed."""
    gallery, gallery_labels = _clusters(60, 0)
    queries, labels = _clusters(42, 1)
    read = lambda: (  # noqa: E731
        knn_accuracy(gallery, gallery_labels, queries, labels, 5),
        leave_one_out_knn(gallery, gallery_labels, 5),
        retrieval_hits(gallery + queries[:1], gallery),
    )
    held: list[int] = []
    vote = readers._vote
    monkeypatch.setattr(readers, "_vote", lambda s, *rest: held.append(s.numel()) or vote(s, *rest))
    whole = read()
    assert held == [42 * 60, 60 * 60] and all(0 < hits.sum() < len(hits) for hits in whole)
    monkeypatch.setattr(readers, "ENTRIES", entries)
    held.clear()
    assert all(torch.equal(a, b) for a, b in zip(read(), whole, strict=True))
    assert sum(held) == 42 * 60 + 60 * 60 and max(held) <= max(entries, 60)


def test_neighbours_of_a_large_gallery_are_read_within_256_mib():
    """100,000 pictures: as many queries at once as fit, counted on rows without channels."""
    asked, held = torch.zeros(2000, 0), []
    read = lambda similarity, first: held.append((first, similarity.numel())) or similarity[:, 0]  # noqa: E731
    found = readers._by_chunks(asked, torch.zeros(100_000, 0), read)
    assert len(found) == 2000 and [first for first, _ in held] == [0, 671, 1342]
    assert max(entries for _, entries in held) * 4 <= 256 * 2**20


def test_probe_finds_classes_that_only_their_direction_tells_apart():
    """One weak linear direction among strong noise: neighbours miss it, the linear reader does not."""
    g = _generator(0)
    x, queries = torch.randn(1500, 20, generator=g), torch.randn(1000, 20, generator=g)
    y, labels = (x[:, 0] > 0).long(), (queries[:, 0] > 0).long()
    x[:, 1:] *= 5
    queries[:, 1:] *= 5
    assert probe_hits(linear_probe(x, y), queries, labels).double().mean() > 0.95
    assert knn_accuracy(x, y, queries, labels).double().mean() < 0.75


def test_knn_does_not_depend_on_what_all_pictures_share():
    x, y = _clusters(200, 0)
    queries, labels = _clusters(100, 1)
    shared = 50 * torch.ones(8)
    plain, moved = knn_accuracy(x, y, queries, labels), knn_accuracy(x + shared, y, queries + shared, labels)
    assert (plain == moved).double().mean() > 0.98


def test_probe_does_not_depend_on_the_length_of_a_row_nor_on_a_common_scale():
    x, y = _clusters(200, 0)
    queries, labels = _clusters(100, 1)
    lengths = torch.logspace(-2, 2, 200)[:, None]
    assert torch.equal(
        probe_hits(linear_probe(lengths * x, y), queries, labels), probe_hits(linear_probe(x, y), 7 * queries, labels)
    )


@pytest.mark.parametrize("classes", [2, 5])
def test_probe_takes_the_strongest_penalty_within_one_standard_error_of_the_best(classes):
    """Brute force: every reader fitted once for each picture left out."""
    x, y = _clusters(60, 5, spread=1.5)
    y = y % classes
    rows = (x / x.norm(dim=1, keepdim=True)).double()
    rows = (rows - rows.mean(0)).numpy()
    scale = 60 * rows.var(axis=0).sum()
    share = []
    for penalty in PENALTIES:
        reader = RidgeClassifier(scale * penalty)
        others = [np.delete(np.arange(60), i) for i in range(60)]
        share.append(np.mean([reader.fit(rows[o], y[o]).predict(rows[[i]])[0] == y[i] for i, o in enumerate(others)]))
    error = math.sqrt(max(share) * (1 - max(share)) / 60)
    allowed = [p for p, s in zip(PENALTIES, share, strict=True) if s >= max(share) - error]
    assert classes == 2 or int(np.argmax(share)) > PENALTIES.index(allowed[0])  # the rule decides here
    assert pytest.approx(scale * allowed[0], rel=1e-4) == linear_probe(x, y).penalty


def _probe_of_sklearn(x, y):
    """The same rule by scikit-learn: RidgeClassifierCV for the leave-one-out scores, RidgeClassifier for the fit."""
    wide = [PCA(256, svd_solver="randomized", iterated_power=2, random_state=0)] if x.shape[1] > 2048 else []
    scaling = make_pipeline(Normalizer(), StandardScaler(with_std=False), *wide)
    rows = scaling.fit_transform(x.numpy()).astype(np.float64)
    penalties = len(rows) * max(float(rows.var(axis=0).sum()), 1e-12) * np.array(PENALTIES)
    search = RidgeClassifierCV(penalties, scoring="accuracy", store_cv_results=True).fit(rows, y.numpy())
    scores = search.cv_results_  # [N, classes or 1, penalties]
    guess = search.classes_[scores.argmax(axis=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).astype(int)]
    share = (guess == y.numpy()[:, None]).mean(axis=0)
    least = share.max() - math.sqrt(share.max() * (1 - share.max()) / len(y))
    reader = RidgeClassifier(penalties[int(np.argmax(share >= least))]).fit(rows, y.numpy())
    return make_pipeline(scaling, reader), share


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pictures", "width", "classes", "kind"),
    [(300, 20, 2, ""), (300, 20, 10, ""), (60, 200, 2, ""), (60, 200, 10, ""), (64, 64, 3, ""), (12, 50, 3, ""),
     (300, 2100, 4, ""), (300, 40, 5, "doubled"), (60, 200, 5, "doubled"), (120, 30, 3, "equal"), (20, 30, 3, "equal"),
     (200, 30, 4, "alike")],
)  # fmt: skip
def test_probe_is_the_one_that_scikit_learn_fits(monkeypatch, pictures, width, classes, kind, seed):
    """Equal guesses, penalty, scores and leave-one-out accuracies; rows that are many, few, of lower rank, or equal."""
    g = _generator(seed)
    centres, scales = torch.randn(classes, width, generator=g), torch.logspace(0, -2, width)
    draw = lambda y: (centres[y] + 2 * torch.randn(len(y), width, generator=g)) * scales  # noqa: E731
    y = torch.cat((torch.arange(classes), torch.randint(classes, (pictures - classes,), generator=g)))
    x, queries = draw(y), draw(torch.randint(classes, (500,), generator=g))
    if kind == "doubled":
        x, queries = (torch.cat((each, each[:, : width // 2]), 1) for each in (x, queries))
    if kind == "equal":
        x, queries = torch.ones_like(x), torch.ones_like(queries)
        y[classes : 2 * classes] = 1  # most often this class, without a tie
    if kind == "alike":
        x, queries = x + 30, queries + 30
    y = 3 * y - 2  # labels need not count from 0
    seen, inner = [], readers._within_one_error
    monkeypatch.setattr(readers, "_within_one_error", lambda share, n: seen.append(share) or inner(share, n))
    monkeypatch.setattr(readers, "SCORES", 17 * classes * 7)  # seven rows at once
    monkeypatch.setattr(readers, "ROWS", 33)
    probe, (peer, share) = linear_probe(x, y), _probe_of_sklearn(x, y)
    assert probe.penalty == pytest.approx(peer[-1].alpha, rel=1e-4)
    assert seen[0].numpy() == pytest.approx(share, abs=0)
    assert torch.equal(probe.predict(queries), torch.from_numpy(peer.predict(queries.numpy())))
    assert np.array_equal(probe.predict(queries.numpy()), peer.predict(queries.numpy()))
    assert kind == "equal" or 1 / classes < share.max() <= 1
    if kind != "equal":
        peer[0][1].mean_ = peer[0][0].transform(queries.numpy()).mean(axis=0)
        assert torch.equal(probe.centred_on(queries).predict(queries), torch.from_numpy(peer.predict(queries.numpy())))


def test_a_quiet_channel_that_shifts_spoils_a_weak_fixed_penalty_and_not_the_chosen_one():
    """Forty quiet channels that fit the fitted pictures by chance: worth nothing, and elsewhere they have moved."""
    g = _generator(0)
    x, y = _clusters(150, 0)
    queries, labels = _clusters(500, 1)
    quiet, elsewhere = (0.01 * torch.randn(n, 40, generator=g) for n in (150, 500))
    x, queries = torch.cat((x, quiet), 1), torch.cat((queries, elsewhere + 0.05), 1)
    weak = make_pipeline(StandardScaler(), LogisticRegression(C=100 / 48, max_iter=500)).fit(x.numpy(), y.numpy())
    chosen, fixed = (probe_hits(probe, queries, labels).double().mean() for probe in (linear_probe(x, y), weak))
    assert chosen > 0.7 and chosen > fixed + 0.2


def test_probe_on_wide_features_reduces_them_and_still_reads_the_class():
    g = _generator(0)
    y, labels = torch.arange(300) % 3, torch.arange(150) % 3
    patterns = torch.randn(3, 2100, generator=g)
    x = patterns[y] + 3 * torch.randn(300, 2100, generator=g)
    queries = patterns[labels] + 3 * torch.randn(150, 2100, generator=g)
    probe = linear_probe(x, y)
    assert probe.weights.shape == (256, 3)
    assert probe_hits(probe, queries, labels).double().mean() > 0.9


def test_probe_works_where_a_class_has_fewer_pictures_than_folds_and_refuses_a_single_class():
    x, y = _clusters(40, 0, spread=0.05)
    few = torch.cat([(y == label).nonzero()[: 2 + label, 0] for label in range(5)])  # two of class 0, three of 1, ..
    assert probe_hits(linear_probe(x[few], y[few]), x, y).double().mean() > 0.9
    with pytest.raises(ValueError, match="2 classes"):
        linear_probe(x, torch.zeros_like(y))


def test_number_of_threads_is_restored_also_on_errors():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_retrieval_finds_itself_and_nothing_when_rows_are_permuted():
    x = torch.randn(50, 16, generator=_generator(0))
    assert retrieval_hits(3 * x, x).all()
    assert not retrieval_hits(x.roll(1, dims=0), x).any()
    half = torch.cat([x[:20], x[20:].roll(1, dims=0)])
    assert retrieval_hits(half, x).sum() == 20


def test_retrieval_of_collapsed_features_is_one_in_n():
    assert retrieval_hits(torch.ones(50, 4), torch.ones(50, 4)).sum() == 1


def test_retrieval_refuses_another_number_of_pictures():
    with pytest.raises(ValueError, match=r"\[4, 2\] and gallery \[5, 2\]"):
        retrieval_hits(torch.ones(4, 2), torch.ones(5, 2))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_effective_rank_of_k_equal_orthogonal_directions_is_k(k):
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=_generator(0)).double())
    signs = torch.cat([torch.eye(k), -torch.eye(k)]).double()  # centred, k equal directions
    features = signs @ basis[:k] + 7.0
    assert effective_rank(features) == pytest.approx(k, abs=1e-6)
    assert effective_rank(100 * features) == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_effective_rank_matches_definition_by_svd(shape):
    x = torch.randn(*shape, generator=_generator(0)).double() * torch.logspace(0, 1, shape[1])
    s = torch.linalg.svdvals(x - x.mean(dim=0))
    p = s[s > 1e-9] / s.sum()
    assert effective_rank(x) == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-6)


def test_effective_rank_of_collapsed_features_is_zero_in_spite_of_rounding_noise():
    noise = 1e-8 * torch.randn(100, 16, generator=_generator(0)).double()
    assert effective_rank(torch.full((100, 16), 0.3) + noise) == 0
    assert effective_rank(torch.zeros(5, 3)) == 0


def test_feature_std_is_zero_at_collapse_and_one_over_root_d_when_spread_evenly():
    assert feature_std(torch.full((30, 8), 2.0)) == 0
    spread = torch.randn(4000, 64, generator=_generator(0))
    assert feature_std(spread) == pytest.approx(1 / 8, rel=0.02)
    assert feature_std(1000 * spread) == pytest.approx(feature_std(spread), rel=1e-6)


def test_cka_is_one_for_rotated_scaled_and_shifted_features():
    g = _generator(0)
    x = torch.randn(200, 10, generator=g)
    rotation, _ = torch.linalg.qr(torch.randn(10, 10, generator=g))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)


def test_cka_matches_definition_on_gram_matrices():
    g = _generator(0)
    x, y = torch.randn(30, 6, generator=g).double(), torch.randn(30, 9, generator=g).double()
    y[:, :3] += x[:, :3]
    h = torch.eye(30).double() - 1 / 30
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-9)


def test_cka_of_independent_features_is_small_and_of_constant_features_zero():
    g = _generator(0)
    x, y = torch.randn(2000, 10, generator=g), torch.randn(2000, 10, generator=g)
    assert linear_cka(x, y) < 0.02
    assert linear_cka(x, torch.ones(2000, 3)) == 0


def test_cka_refuses_another_number_of_pictures():
    with pytest.raises(ValueError, match="got 4 and 5 rows"):
        linear_cka(torch.ones(4, 2), torch.ones(5, 2))


def test_bootstrap_interval_covers_a_binomial_proportion_as_often_as_it_says():
    g = _generator(0)
    covered = []
    for seed in range(300):
        mean, low, high = bootstrap_interval(torch.rand(300, generator=g) < 0.7, n=400, seed=seed)
        assert low <= mean <= high
        covered.append(low <= 0.7 <= high)
    assert 0.91 < np.mean(covered) < 0.99


def test_bootstrap_interval_has_the_width_of_a_binomial_proportion():
    hits = torch.arange(1000) < 700
    mean, low, high = bootstrap_interval(hits)
    assert mean == 0.7
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 1000), rel=0.1)
    assert bootstrap_interval(hits) == (mean, low, high)


def test_bootstrap_draws_placements_of_one_picture_together():
    """Ten equal hits of each of 100 pictures are worth no more than one of each."""
    hits = torch.rand(100, generator=_generator(0)) < 0.7
    once, ten = bootstrap_interval(hits), bootstrap_interval(hits.repeat(10), groups=torch.arange(100).repeat(10))
    assert ten == pytest.approx(once)
    _, low, high = bootstrap_interval(hits.repeat(10))
    assert high - low < 0.5 * (once[2] - once[1])


def test_jackknife_interval_of_a_mean_equals_its_standard_error():
    x = torch.randn(400, generator=_generator(0)).double()
    value, low, high = jackknife_interval(lambda rows: float(x[rows].mean()), 400, groups=400)
    assert value == pytest.approx(float(x.mean()))
    assert (high - low) / 2 == pytest.approx(student.ppf(0.975, 399) * float(x.std()) / 20, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_one_row_or_two_have_no_jackknife_interval(n):
    x = torch.randn(n, 5, generator=_generator(0))
    value, *ends = jackknife_interval(lambda rows: feature_std(x[rows]), n)
    assert np.isnan(ends).all() and (math.isnan(value) if n == 1 else value == feature_std(x))


def test_jackknife_in_ten_groups_has_about_that_width_too():
    x = torch.randn(20000, generator=_generator(0)).double()
    widths = [jackknife_interval(lambda rows: float(x[rows].mean()), 20000, seed=s) for s in range(40)]
    mean_width = np.mean([(high - low) / 2 for _, low, high in widths])
    assert mean_width == pytest.approx(student.ppf(0.975, 9) / math.sqrt(20000), rel=0.15)


def test_jackknife_in_ten_groups_covers_a_mean_as_often_as_it_says():
    """With the normal quantile in place of Student's, 92 of 100 intervals would hold the truth."""
    g, covered = _generator(0), []
    for _ in range(1500):
        x = torch.randn(100, generator=g).double()
        _, low, high = jackknife_interval(lambda rows, x=x: float(x[rows].mean()), 100)
        covered.append(low <= 0 <= high)
    assert 0.935 < np.mean(covered) < 0.965


def test_a_matrix_of_low_rank_has_eigenvectors_and_a_probe():
    """The counts of six of 216 colours, as in grey pictures: torch.linalg.eigh alone fails on some, with MKL."""
    colours = torch.arange(0, 216, 43)
    with one_thread():
        for seed in range(60):
            counts = torch.zeros(50, 216, dtype=torch.float64)
            counts[:, colours] = torch.rand(50, 6, generator=_generator(seed), dtype=torch.float64)
            counts -= counts.mean(0)
            matrix = counts.T @ counts
            values, vectors = symmetric_eigen(matrix)
            torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=0, atol=1e-10)
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(216).double(), rtol=0, atol=1e-10)
            assert np.allclose(values[-6:], np.linalg.eigvalsh(matrix[colours[:, None], colours]))


def test_a_failure_of_torch_is_answered_by_scipy(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    x, y = _clusters(60, 0)
    expected = linear_probe(x, y)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = linear_probe(x, y)
    assert found.penalty == pytest.approx(expected.penalty)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-9)
