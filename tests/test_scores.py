"Scores against scikit-learn and against all pairs, intervals against simulation."
import subprocess, sys, tracemalloc

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cxr_lab import scores
from cxr_lab.scores import (METRICS, calibration_error, choose_threshold, intervals, mean_sd,
                            patient_weights, score, weighted_scores)

def case(seed, n=None, digits=2):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n or rng.integers(2, 60))
    return y, np.round(rng.random(len(y)) * .8 + .2 * y, digits), rng

def by_sklearn(y, p, threshold, w=None):
    hit, one = (p >= threshold).astype(int), dict(zero_division=np.nan, sample_weight=w)
    recall, specificity = sk.recall_score(y, hit, **one), sk.recall_score(y, hit, pos_label=0, **one)
    held = np.ones(len(y)) if w is None else w
    both = all(held[y == c].sum() for c in (0, 1))
    return dict(recall=recall, precision=sk.precision_score(y, hit, **one), accuracy=sk.accuracy_score(y, hit, sample_weight=w), f1=sk.f1_score(y, hit, **one),
                specificity=specificity, balanced_accuracy=(recall + specificity) / 2, auroc=sk.roc_auc_score(y, p, sample_weight=w) if both else np.nan)

@pytest.mark.parametrize('digits', [1, 6])
def test_score_against_sklearn(digits):
    for seed in range(150):
        y, p, rng = case(seed, digits=digits)
        threshold = float(rng.choice([.5, 0, 1, *p]))
        found = score(y, p, threshold)
        assert list(found) == list(METRICS)
        for k, v in by_sklearn(y, p, threshold).items(): assert (found[k] is None and np.isnan(v)) or found[k] == pytest.approx(v, abs=1e-12), (seed, k)

def test_score_is_inclusive_at_the_threshold_and_undefined_is_none():
    assert score([0, 1], [.2, .5])['accuracy'] == 1
    one = score([1, 1], [.1, .9])
    assert one['recall'] == .5 and one['specificity'] is one['auroc'] is one['balanced_accuracy'] is None
    assert score([0, 0], [.1, .2])['precision'] is None and score([0, 1], [.1, .2])['precision'] is None
    for y, p in [([0, 1], [.5]), ([], []), ([[0]], [[.5]])]:
        with pytest.raises(ValueError, match='equally long vectors'): score(y, p)

def test_weighted_scores_against_sklearn():
    for seed in range(40):
        y, p, rng = case(seed, 30, digits=seed % 3 + 1)
        weights, threshold = rng.integers(0, 4, (6, 30)).astype(np.int16), float(rng.choice([.5, p[0]]))
        found = weighted_scores(y, p, weights, threshold)
        assert list(found) == list(METRICS)
        for i, w in enumerate(weights):
            for k, v in by_sklearn(y, p, threshold, w.astype(float)).items(): assert found[k][i] == pytest.approx(v, abs=1e-6, nan_ok=True), (seed, k)
        plain = weighted_scores(y, p, np.ones((1, 30), np.int16), threshold)
        for k, v in score(y, p, threshold).items(): assert plain[k][0] == pytest.approx(np.nan if v is None else v, nan_ok=True)

def test_weighted_scores_are_exact_for_large_sets():
    y, p, _ = case(0, 4000, digits=6)
    w = patient_weights(np.arange(4000) // 3, 3)
    found = weighted_scores(y, p, w)
    for i in range(3):
        for k, v in by_sklearn(y, p, .5, w[i].astype(float)).items(): assert found[k][i] == pytest.approx(v, abs=1e-6)

def test_intervals_cover_the_truth():
    "Patients with three images that share an error: about 95 % of 200 intervals hold the true accuracy; a bootstrap over images would not."
    rng, covered, naive, trials = np.random.default_rng(0), 0, 0, 200
    for trial in range(trials):
        patient = np.arange(150) // 3
        y = (patient % 2).astype(int)
        right = np.where(rng.random(50)[patient] < .9, rng.random(50)[patient] < .8, rng.random(150) < .8)
        df = pd.DataFrame(dict(patient=patient, label=y, probability=np.where(right, y, 1 - y) * .8 + .1))
        low, high = intervals(df, n_boot=300, seed=trial)['accuracy']
        covered += low <= .8 <= high
        low, high = intervals(df.assign(patient=range(150)), n_boot=300, seed=trial)['accuracy']
        naive += low <= .8 <= high
    assert .89 <= covered / trials <= .985 and naive / trials < .85

def test_intervals_hold_the_estimate_and_are_seeded():
    y, p, _ = case(3, 60)
    df = pd.DataFrame(dict(patient=np.arange(60) // 2, label=y, probability=p))
    found = intervals(df, n_boot=200)
    for k, v in score(y, p).items(): assert found[k][0] <= v <= found[k][1]
    assert found == intervals(df, n_boot=200) != intervals(df, n_boot=200, seed=1)

def test_choose_threshold_against_brute_force():
    def youden(y, p, t): return ((p >= t)[y == 1]).mean() - ((p >= t)[y == 0]).mean()
    for seed in range(200):
        y, p, rng = case(seed, digits=int(seed % 3 + 1))
        if 0 < y.sum() < len(y):
            t = choose_threshold(y, p)
            assert 0 <= t <= 1 and youden(y, p, t) == pytest.approx(max(youden(y, p, x) for x in [*p, 2.])), seed

def test_choose_threshold_is_halfway():
    assert choose_threshold([0, 0, 1, 1], [.1, .2, .6, .8]) == pytest.approx(.4)
    assert choose_threshold([0, 1], [0., 1.]) == pytest.approx(.5)
    worst = choose_threshold([1, 1, 0, 0], [.1, .2, .6, .8])
    assert 0 <= worst <= 1 and np.isfinite(worst)

def test_choose_threshold_needs_both_classes():
    with pytest.raises(ValueError): choose_threshold([1, 1], [.2, .4])

def test_calibration_error():
    assert calibration_error([0, 1], [0., 1.]) == 0 and calibration_error([1, 0], [0., 1.]) == 1
    assert calibration_error([0, 1, 1, 1], [.75] * 4) == pytest.approx(0) and calibration_error([0, 0], [.25, .35]) == pytest.approx(.3)
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    assert calibration_error(rng.random(20000) < p, p) < .02 and calibration_error(rng.random(20000) < p**2, p) == pytest.approx(1 / 6, abs=.02)
    y, p, _ = case(1, 50)
    edges = np.linspace(0, 1, 11); edges[-1] = 1.1
    naive = sum(abs(y[b].mean() - p[b].mean()) * b.sum() / 50 for lo, hi in zip(edges, edges[1:]) if (b := (p >= lo - 1e-12) & (p < hi - 1e-12)).any())
    assert calibration_error(y, p) == pytest.approx(naive, abs=.02)

def test_mean_and_standard_deviation():
    assert mean_sd([.9, .92]) == '0.910 ± 0.014' and mean_sd([.5]) == '0.500' and mean_sd([None, None]) == 'undefined'


# Growth

def by_pairs(y, p, w):
    "AUROC of weighted samples as it is defined: every ill image against every healthy one."
    above = (p[y == 1][:, None] > p[y == 0]) + .5 * (p[y == 1][:, None] == p[y == 0])
    with np.errstate(invalid='ignore'):
        return np.array([v[y == 1] @ above @ v[y == 0] / (v[y == 1].sum() * v[y == 0].sum()) for v in w])

@pytest.mark.parametrize('block', [1, 100, 2 ** 20])
def test_auroc_is_that_of_all_pairs_in_blocks_of_any_size(monkeypatch, block):
    "Equal, not nearly: with whole weights every sum is exact."
    monkeypatch.setattr(scores, '_BLOCK', block)
    for seed in range(30):
        y, p, rng = case(seed, digits=seed % 4 + 1)
        w = rng.integers(0, 3, (7, len(y))).astype(np.int16)
        assert np.array_equal(weighted_scores(y, p, w)['auroc'], by_pairs(y, p, w.astype(float)), equal_nan=True), seed

def test_samples_do_not_depend_on_the_size_of_blocks(monkeypatch):
    patient = np.random.default_rng(0).integers(0, 40, 100)
    df = pd.DataFrame(dict(patient=patient, label=patient % 2, probability=np.linspace(0, 1, 100)))
    whole, found = patient_weights(patient, 50, 3), intervals(df, n_boot=50, seed=3)
    codes, names = pd.factorize(patient)
    drawn = np.random.default_rng(3).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    assert np.array_equal(whole, drawn[:, codes]) and whole.dtype == np.int16
    for block in (1, 700):
        monkeypatch.setattr(scores, '_BLOCK', block)
        assert np.array_equal(patient_weights(patient, 50, 3), whole) and intervals(df, n_boot=50, seed=3) == found

def test_no_samples_are_no_scores():
    assert patient_weights(['a', 'b'], 0).shape == (0, 2)
    assert all(v.shape == (0,) for v in weighted_scores([0, 1], [.1, .9], np.empty((0, 2))).values())

def test_memory_of_intervals_does_not_grow_with_samples_times_images():
    "30,000 images and 200 samples: the weights alone would be 48 MB as float64, all pairs 7 GB."
    n = 30_000
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(patient=np.arange(n), label=rng.random(n) < .6, probability=rng.random(n)))
    intervals(df.head(50), n_boot=5)  # whatever is imported on first use
    tracemalloc.start()
    try:
        low, high = intervals(df, n_boot=200)['auroc']
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert low < .5 < high and peak < 60e6

def test_scores_import_no_torch_and_no_scikit_learn():
    code = 'import sys, cxr_lab.scores; print(*[m for m in ("torch", "sklearn", "matplotlib") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ''
