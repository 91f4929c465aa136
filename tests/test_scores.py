"Scores against scikit-learn and against all pairs, intervals against simulation."
import subprocess, sys, tracemalloc, warnings

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr
from sklearn import metrics as sk

from cxr_lab import scores
from cxr_lab.scores import (METRICS, calibration_error, choose_threshold, compare_with,
                            differences_as_text, holm, intervals, mean_sd, patient_pulls,
                            patient_weights, recipe_difference, recipe_mean, score, seed_columns,
                            weighted_scores)

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


# Seeds and patients together

def networks(rng, y, size, seeds, quality=.8, shift=0., own=.8):
    "Probabilities (S,N) of networks that find the same patients hard; with ties."
    hard = .8 * rng.normal(size=len(size)).repeat(size)
    noise = rng.normal(size=(seeds, len(y)))
    return np.round(1 / (1 + np.exp(-((2 * y - 1) * quality + shift + hard + own * noise))), 2)

def study(seed, seeds=3, patients=80, **kinds):
    "A frame as load_recipes makes it, with recipes a and b."
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 5, patients)
    y = rng.permutation(np.arange(patients) % 5 < 3).astype(int).repeat(size)
    out = pd.DataFrame(dict(patient=np.arange(patients).repeat(size), label=y))
    for r in 'ab':
        p = networks(rng, y, size, seeds, **kinds.get(r, {}))
        out[seed_columns(r, range(seeds))] = p.T
    return out

@pytest.mark.parametrize('threshold', [.5, .31])
def test_pulls_are_derivatives_by_the_weight_of_a_patient(threshold):
    df = study(0)
    p = df[seed_columns('a', range(3))].to_numpy().T
    pulled = patient_pulls(df.label, p, df.patient, threshold)
    assert list(pulled) == list(METRICS)
    for k, v in weighted_scores(df.label, p[1], np.ones((1, len(df))), threshold).items():
        assert pulled[k][0][1] == pytest.approx(v[0])
        assert abs(pulled[k][1].sum(1)).max() < 1e-12, 'all patients heavier: nothing changes'
    for patient in range(0, 80, 7):
        w = np.ones((2, len(df)))
        w[:, df.patient == patient] += [[-1e-4], [1e-4]]
        for k, (low, high) in weighted_scores(df.label, p[1], w, threshold).items():
            assert (high - low) / 2e-4 == pytest.approx(pulled[k][1][1, patient], abs=1e-6), k

def test_pulls_know_thresholds_of_each_network_and_patients_in_any_order():
    df = study(1)
    p = df[seed_columns('a', range(3))].to_numpy().T
    one_by_one = [patient_pulls(df.label, p[[i]], df.patient, t) for i, t in enumerate((.2, .5, .7))]
    together = patient_pulls(df.label, p, df.patient, [.2, .5, .7])
    order = np.random.default_rng(0).permutation(len(df))
    mixed = patient_pulls(df.label.to_numpy()[order], p[:, order], df.patient.to_numpy()[order], .5)
    straight = patient_pulls(df.label, p, df.patient, .5)
    for k in METRICS:
        for i in range(3):
            assert np.allclose(together[k][1][i], one_by_one[i][k][1][0])
            assert np.allclose(np.sort(mixed[k][1][i]), np.sort(straight[k][1][i]))

def test_squared_pulls_are_the_variance_by_delong_and_by_leaving_patients_out():
    rng = np.random.default_rng(2)
    y = (np.arange(200) < 90).astype(int)
    p = np.round(rng.normal(y, 1), 1)
    value, pull = patient_pulls(y, p[None], np.arange(200))['auroc']
    above = (p[y == 1][:, None] > p[y == 0]) + .5 * (p[y == 1][:, None] == p[y == 0])
    ill, well = above.mean(1), above.mean(0)  # DeLong's components, as they are defined
    assert (pull ** 2).sum() == pytest.approx(ill.var() / 90 + well.var() / 110)
    df = study(3, patients=150)
    p = df.a_0.to_numpy()
    without = 1 - (df.patient.to_numpy() == np.arange(150)[:, None])
    for k, v in weighted_scores(df.label, p, without).items():
        jackknife = ((v - v.mean()) ** 2).sum() * 149 / 150
        found = (patient_pulls(df.label, p[None], df.patient)[k][1] ** 2).sum() * 150 / 149
        assert found == pytest.approx(jackknife, rel=.05), k

def test_variance_of_patients_is_that_of_a_bootstrap():
    df = study(4, patients=200)
    w = patient_weights(df.patient, 4000)
    boot = {r: [weighted_scores(df.label, df[c], w) for c in seed_columns(r, range(3))]
            for r in 'ab'}
    d = recipe_difference(df, 'a', 'b', range(3))
    for k in METRICS:
        c = np.cov([b[k] - a[k] for a, b in zip(boot['a'], boot['b'])])
        shared = (c.sum() - np.trace(c)) / 6
        scale = np.trace(c) / 3
        assert d.sd_patient[k] ** 2 == pytest.approx(max(shared, 0), abs=.1 * scale), k
        assert d.sd_rest[k] ** 2 == pytest.approx(scale - shared, abs=.1 * scale), k

def test_components_of_a_balanced_two_way_table():
    """Mean of a table of seeds by patients: the classical estimates for two crossed random factors
    (mean squares of rows, columns and rest; Searle 1971) are what pulls of a mean give."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 1)) + rng.normal(size=(1, 50)) + .5 * rng.normal(size=(4, 50))
    pulls = (table - table.mean(1, keepdims=True)) / 50
    between, shared, one = scores._between_and_shared(table.mean(1), pulls)
    grand = table.mean()
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + grand
    ms_seed = 50 * ((table.mean(1) - grand) ** 2).sum() / 3
    ms_patient = 4 * ((table.mean(0) - grand) ** 2).sum() / 49
    ms_rest = (rest ** 2).sum() / (3 * 49)
    assert between == pytest.approx(ms_seed / 50)
    assert shared == pytest.approx((ms_patient - ms_rest) / 4 / 50)
    assert one - shared == pytest.approx(ms_rest / 50)
    error, _, _, sd = scores._doubt([(table.mean(1), pulls)])
    classical = (ms_seed + ms_patient - ms_rest) / (4 * 50)
    assert error ** 2 == pytest.approx(classical)
    assert sd['sd_seed'] ** 2 == pytest.approx((ms_seed - ms_rest) / 50)

def test_quantile_is_student_where_one_source_is_all_and_between_otherwise():
    from scipy.stats import t
    def q(v1, v2): return scores._quantile(np.array([[v1, 2], [v2, 400]]), .05)
    assert q(1, 0) == pytest.approx(t.ppf(.975, 2)) and q(0, 1) == pytest.approx(t.ppf(.975, 400))
    assert q(1, 3) == pytest.approx((t.ppf(.975, 2) + 3 * t.ppf(.975, 400)) / 4)

def test_p_says_what_the_interval_says():
    for seed in range(30):
        d = recipe_difference(study(seed, patients=40, b=dict(quality=.8 + seed / 25)), 'a', 'b', range(3))
        assert ((d.p < .05) == ((d.low > 0) | (d.high < 0))).all()
        assert np.allclose(d.difference, (d.low + d.high) / 2) and d.p.between(0, 1).all()
    terms = np.array([[1e-4, 2], [2e-4, 300]])
    for p in (.9, .05, 1e-3, 1e-9): assert scores._p_value(scores._quantile(terms, p), terms) == pytest.approx(p)

def test_p_where_two_seeds_agree_to_the_last_digit():
    from scipy.stats import t
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        terms = np.array([[0., 1], [4e-4, 200]])
        assert scores._p_value(2.5, terms) == pytest.approx(2 * t.sf(2.5, 200))
        for v in (1e-30, 1e-6, 1.): assert 0 < scores._p_value(3., np.array([[v, 1], [0., 200]])) < .3

def test_swapping_recipes_swaps_the_sign_and_a_recipe_does_not_differ_from_itself():
    df = study(5)
    one, two = (recipe_difference(df, *names, range(3)) for names in ('ab', 'ba'))
    assert np.allclose(one.difference, -two.difference) and np.allclose(one.low, -two.high)
    assert np.allclose(one.p, two.p) and np.allclose(one.sd_seed, two.sd_seed)
    same = recipe_difference(df, 'a', 'a', range(3))
    assert (same[['difference', 'low', 'high']] == 0).all(axis=None) and (same.p == 1).all()

def test_values_are_those_of_score_and_of_thresholds():
    df = study(6)
    at = {'a_0': .3, 'b_2': .7}
    d, m = recipe_difference(df, 'a', 'b', range(3), thresholds=at), recipe_mean(df, 'b', range(3), at)
    for k in METRICS:
        a, b = (np.mean([score(df.label, df[c], at.get(c, .5))[k] for c in seed_columns(r, range(3))])
                for r in 'ab')
        assert d.a[k] == pytest.approx(a) and d.b[k] == m['mean'][k] == pytest.approx(b)
        assert 0 < m.low[k] < b < m.high[k] < 1

@pytest.mark.parametrize('seeds', [1, 2, 3, 5])
def test_any_number_of_seeds(seeds):
    df = study(7, seeds, patients=150, b=dict(quality=1.2))
    d, m = recipe_difference(df, 'a', 'b', range(seeds)), recipe_mean(df, 'a', range(seeds))
    assert np.isfinite(d[['a', 'b', 'difference']]).all(axis=None)
    assert np.isfinite(d.drop(columns=['a', 'b', 'difference'])).all(axis=None) == (seeds > 1)
    if seeds == 1:
        assert d[['low', 'high', 'p', 'sd_seed', 'sd_patient', 'sd_rest']].isna().all(axis=None)
        assert m[['low', 'high']].isna().all(axis=None)

def test_no_difference_is_larger_than_one():
    df = study(7, 2, patients=12, b=dict(quality=3.))
    d = recipe_difference(df, 'a', 'b', range(2))
    assert (d.low >= -1).all() and (d.high <= 1).all() and (d.high == 1).any()

def test_seeds_that_share_nothing():
    "Other numbers of seeds; variances of both recipes add up, patients stay paired."
    df = study(8, 5, patients=150)
    d = recipe_difference(df, 'a', 'b', range(3), seeds_b=[1, 2, 3, 4])
    for k in METRICS:
        pulls = {r: patient_pulls(df.label, df[seed_columns(r, s)].to_numpy().T, df.patient)[k]
                 for r, s in (('a', range(3)), ('b', range(1, 5)))}
        c = np.cov(np.concatenate([p for _, p in pulls.values()]), ddof=0) * 150 * 150 / 149
        aa, bb, ab = c[:3, :3], c[3:, 3:], c[:3, 3:]
        def off(c): return (c.sum() - np.trace(c)) / (c.size - len(c))
        shared = max(0, off(aa) + off(bb) - 2 * ab.mean())
        terms = np.array([[pulls['a'][0].var(ddof=1) / 3, 2], [pulls['b'][0].var(ddof=1) / 4, 3],
                          [shared, 149]])
        half = scores._quantile(terms, .05) * terms[:, 0].sum() ** .5
        assert d.high[k] - d.low[k] == pytest.approx(2 * half)
        assert d.sd_patient[k] == pytest.approx(shared ** .5)

def test_what_cannot_be_judged_is_nan_without_a_warning():
    y = np.repeat([0, 1], 10)
    df = pd.DataFrame(dict(patient=np.arange(20), label=y))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for s in range(3): df[f'a_{s}'], df[f'b_{s}'] = y * .8 + .1, .2
        d = recipe_difference(df, 'a', 'b', range(3))
        assert d.difference['recall'] == -1 and d.loc['recall', ['low', 'high', 'p']].isna().all()
        assert d.difference['specificity'] == 0 and d.p['specificity'] == 1
        assert d.loc['precision', ['b', 'difference', 'low', 'p']].isna().all(), 'nothing is called ill'
        assert recipe_mean(df, 'a', range(3)).loc['recall', ['low', 'high']].isna().all()
        ill = recipe_difference(df[df.label == 1], 'a', 'b', range(3))
        assert np.isnan(ill.a['auroc']) and np.isnan(ill.p['specificity']) and ill.a['recall'] == 1
        lonely = recipe_difference(df.assign(patient=0), 'a', 'b', range(3))
        assert lonely.p.isna().all()

def simulate(rng, studies, seeds, seed_sd, patients):
    """Many studies of two recipes at once: probabilities (studies,S,N) of each. Clusters of one to
    four images; seeds shift threshold and quality, the same seed alike in both recipes to a part."""
    size = 1 + np.arange(patients) % 4 * (np.arange(patients) % 3 == 0)
    y = (np.arange(patients) % 5 < 3).repeat(size)
    def normal(*shape): return rng.normal(size=shape)
    hard = .6 * normal(studies, 1, patients).repeat(size, 2) + .8 * normal(studies, 1, len(y))
    luck, out = .5 ** .5 * normal(2, studies, seeds, 1), {}
    for r, q in QUALITY.items():
        here = .5 * normal(studies, 1, patients).repeat(size, 2)
        better, readier = seed_sd * (luck + .5 ** .5 * normal(2, studies, seeds, 1))
        sign = 2 * y - 1
        out[r] = ndtr(sign * (q + better) + readier + hard + here + .4 * normal(studies, seeds, len(y)))
    return y, np.arange(patients).repeat(size), out

QUALITY = {'a': .9, 'b': 1.3}
NOISE = (.6**2 + .8**2 + .5**2 + .4**2) ** .5

def truth(q, seed_sd, share):
    "Mean over all seeds, in closed form for each, by Gauss and Hermite over both lucks."
    x, w = np.polynomial.hermite_e.hermegauss(40)
    better, readier, w = q + seed_sd * x[:, None], seed_sd * x, np.outer(w, w) / w.sum() ** 2
    recall, specificity = ndtr((better + readier) / NOISE), ndtr((better - readier) / NOISE)
    tp, tn = share * recall, (1 - share) * specificity
    fp, fn = 1 - share - tn, share - tp
    each = dict(recall=recall, specificity=specificity, precision=tp / (tp + fp), accuracy=tp + tn,
                f1=2 * tp / (2 * tp + fp + fn), balanced_accuracy=(recall + specificity) / 2,
                auroc=ndtr(2 ** .5 * better / NOISE))
    return {k: (v * w).sum() for k, v in each.items()}

def coverage(seeds, seed_sd, studies, patients, start=0):
    "Share of intervals that hold the truth, by metric: of differences, of means, of fixed networks."
    rng = np.random.default_rng(start)
    y, patient, p = simulate(rng, studies, seeds, seed_sd, patients)
    true = {r: truth(q, seed_sd, y.mean()) for r, q in QUALITY.items()}
    pulled = {r: patient_pulls(y, v.reshape(-1, len(y)), patient) for r, v in p.items()}
    rows = []
    for k in METRICS:
        (va, pa), (vb, pb) = (pulled[r][k] for r in 'ab')
        for i in range(studies):
            s = slice(i * seeds, (i + 1) * seeds)
            d = vb[s] - va[s], pb[s] - pa[s]
            error, quantile, _, _ = scores._doubt([d])
            off = abs(d[0].mean() - true['b'][k] + true['a'][k])
            one = scores._mean_interval(vb[s], pb[s])
            rows.append(dict(metric=k, difference=off <= quantile * error,
                             mean=one['low'] <= true['b'][k] <= one['high'],
                             fixed=off <= 1.96 * (d[1].mean(0) ** 2).sum() ** .5))
    return pd.DataFrame(rows).groupby('metric').mean()

@pytest.mark.parametrize('seeds', [3, 5])
def test_intervals_over_seeds_and_patients_cover_the_truth(seeds):
    "200 studies; where seeds matter, the interval of fixed networks does not."
    none, large = (coverage(seeds, sd, 200, 120) for sd in (0, .3))
    for found in (none, large):
        assert found[['difference', 'mean']].min(axis=None) >= .90
        assert found.loc[['accuracy', 'auroc'], ['difference', 'mean']].to_numpy().mean() <= .985
    assert none.fixed.mean() > .9 and large.fixed.mean() < .85

@pytest.mark.slow
@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize('luck', ['none', 'moderate', 'large'])
def test_coverage_of_2000_studies(seeds, luck):
    "Between 92 and 98 % for accuracy and AUROC, and for the mean over metrics; 1 SD is 0.5 %."
    sd = dict(none=0., moderate=.06, large=.18)[luck]
    found = coverage(seeds, sd, 2000, 200)
    print(found.round(3))
    for kind in ('difference', 'mean'):
        assert found.loc[['accuracy', 'auroc'], kind].between(.92, .98).all(), found
        assert .92 <= found[kind].mean() <= .98

def test_single_test_example_by_hand():
    "Three seeds, two patients' worth of arithmetic: every number of the interval written out."
    values, pulls = np.array([.1, .2, .3]), np.array([[.1, -.1], [.2, -.2], [.0, .0]])
    covariance = np.array([[.02, .04, 0], [.04, .08, 0], [0, 0, 0]]) * 2
    shared = covariance[0, 1] * 2 / 6
    error, quantile, terms, sd = scores._doubt([(values, pulls)])
    assert np.allclose(terms, [[.01 / 3, 2], [shared, 1]]) and error ** 2 == pytest.approx(.01 / 3 + shared)
    assert quantile == pytest.approx((.01 / 3 * 4.302653 + shared * 12.706205) / (.01 / 3 + shared))
    assert sd['sd_rest'] ** 2 == pytest.approx(np.trace(covariance) / 3 - shared)


# Families

def test_holm_against_its_definition():
    def slow(p):  # reject step by step: p is the smallest level at which it is rejected
        out = []
        for i in range(len(p)):
            for level in sorted({min(1, v * m) for v in p for m in range(1, len(p) + 1)} | {1.}):
                left, rejected = list(range(len(p))), set()
                while left and min(p[j] for j in left) * len(left) <= level + 1e-15:
                    rejected.add(best := min(left, key=lambda j: p[j]))
                    left.remove(best)
                if i in rejected or level == 1: out.append(level); break
        return out
    for seed in range(40):
        p = np.random.default_rng(seed).random(seed % 6 + 1) ** 3
        assert np.allclose(holm(p), slow(list(p))), seed
    assert np.allclose(holm([.01, .04, .03]), [.03, .06, .06]) and len(holm([])) == 0
    found = holm([np.nan, .02, np.nan, .03])
    assert np.isnan(found[[0, 2]]).all() and np.allclose(found[[1, 3]], [.04, .04])

def test_a_family_is_as_large_as_its_table():
    df = study(9, b=dict(quality=1.6))
    df[seed_columns('c', range(3))] = df[seed_columns('a', range(3))]
    family = compare_with(df, 'a', {'b': 'better', 'c': 'the same'}, range(3))
    assert list(family.index.names) == ['recipe', 'metric'] and len(family) == 10
    assert np.allclose(family.p_holm, holm(family.p)) and (family.p_holm >= family.p).all()
    alone = recipe_difference(df, 'a', 'b', range(3))
    assert (family.loc['better'].difference == alone.difference[family.loc['better'].index]).all()
    text = differences_as_text(family)
    assert list(text.index) == ['better', 'the same']
    assert list(text) == ['accuracy', 'f1', 'specificity', 'recall', 'auroc']
    assert text.auroc['the same'] == '+0.000 (+0.000 to +0.000)' and text.auroc['better'].endswith('*')
    one = differences_as_text(compare_with(df, 'a', {'b': 'better'}, [0]))
    assert one.auroc['better'].endswith(' (no interval)')
    nobody = df.assign(**dict.fromkeys(seed_columns('b', range(3)), .2), label=0)
    text = differences_as_text(compare_with(nobody, 'a', {'b': 'x'}, range(3), ['auroc', 'accuracy']))
    assert text.auroc['x'] == 'undefined' and text.accuracy['x'].startswith('+')
