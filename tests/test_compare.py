"Paired differences, McNemar, common errors, against slow and simple versions."
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from cxr_lab.compare import error_overlap, explained, mcnemar, network_pairs, paired_differences, show_network_pairs
from cxr_lab.runs import MissingUpstream, Step
from cxr_lab.scores import METRICS, load_recipes, patient_weights

SEEDS = [0, 1]

def made_up(n=60, seed=0, better=.5, digits=2):
    "Two recipes, two seeds; b separates the classes better; ties are common."
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < .6).astype(int)
    def probabilities(sharp): return np.round(1 / (1 + np.exp(-(sharp * (2 * label - 1) + rng.normal(size=n)))), digits)
    columns = {f'{r}_{s}': probabilities(.5 + better * (r == 'b')) for r in 'ab' for s in SEEDS}
    return pd.DataFrame(dict(path=[f'test/{i:03d}.jpeg' for i in range(n)], patient=[f'p{i // 2}' for i in rng.permutation(n)], label=label) | columns)

def naive(label, p, threshold):
    hit = (p >= threshold).astype(int)
    specificity = sk.recall_score(label, hit, pos_label=0)
    recall = sk.recall_score(label, hit)
    return dict(recall=recall, precision=sk.precision_score(label, hit), accuracy=sk.accuracy_score(label, hit), f1=sk.f1_score(label, hit), specificity=specificity,
                balanced_accuracy=(recall + specificity) / 2, auroc=sk.roc_auc_score(label, p))

@pytest.mark.parametrize('thresholds', [None, {'a_0': .3, 'b_1': .7}])
def test_paired_differences_against_a_loop(thresholds):
    pair, n_boot, at = made_up(), 40, thresholds or {}
    found = paired_differences(pair, 'a', 'b', SEEDS, n_boot, 7, thresholds)
    def mean(rows, r): return pd.DataFrame([naive(pair.label.to_numpy()[rows], pair[f'{r}_{s}'].to_numpy()[rows], at.get(f'{r}_{s}', .5)) for s in SEEDS]).mean()
    every = np.arange(len(pair))
    a, b = mean(every, 'a'), mean(every, 'b')
    samples = [np.repeat(every, w) for w in patient_weights(pair.patient, n_boot, 7)]
    boot = pd.DataFrame([mean(rows, 'b') - mean(rows, 'a') for rows in samples])
    for k in METRICS:
        row = found.loc[k]
        assert row.a == pytest.approx(a[k]) and row.b == pytest.approx(b[k]) and row.difference == pytest.approx(b[k] - a[k])
        assert row.low == pytest.approx(np.percentile(boot[k], 2.5)) and row.high == pytest.approx(np.percentile(boot[k], 97.5))
        share = min((boot[k] <= 1e-12).mean(), (boot[k] >= -1e-12).mean())
        assert row.p == pytest.approx(min(1, 2 * max(share, 1 / (n_boot + 1)))), k

def test_samples_are_of_whole_patients():
    weights = patient_weights(['x', 'y', 'x', 'z', 'y', 'x'], 500, 1)
    assert weights.shape == (500, 6) and (weights[:, 0] == weights[:, 2]).all() and (weights[:, 0] == weights[:, 5]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all() and weights.mean() == pytest.approx(1, abs=.1)
    assert (patient_weights(list('xyxz'), 9, 3) == patient_weights(list('xyxz'), 9, 3)).all()

def test_a_recipe_does_not_differ_from_itself_and_swapping_changes_the_sign():
    pair = made_up()
    same = pair.assign(**{f'b_{s}': pair[f'a_{s}'] for s in SEEDS})
    d = paired_differences(same, 'a', 'b', SEEDS, 50, 0)
    assert (d[['difference', 'low', 'high']] == 0).all(axis=None) and (d.p == 1).all()
    swapped = pair.rename(columns={f'{r}_{s}': f'{"ba"["ab".index(r)]}_{s}' for r in 'ab' for s in SEEDS})
    one, two = paired_differences(pair, 'a', 'b', SEEDS, 100, 0), paired_differences(swapped, 'a', 'b', SEEDS, 100, 0)
    assert np.allclose(one.difference, -two.difference) and np.allclose(one.low, -two.high) and np.allclose(one.p, two.p)

def test_p_values_are_uniform_enough_without_a_difference():
    "Two recipes of equal quality: not more than a tenth of 100 tests at .05 may find something."
    p = [paired_differences(made_up(100, seed, better=0, digits=6), 'a', 'b', SEEDS, 200, seed).p['accuracy'] for seed in range(100)]
    assert np.mean(np.array(p) < .05) <= .1 and np.mean(p) == pytest.approx(.5, abs=.12)

def test_a_large_difference_is_found():
    d = paired_differences(made_up(300, better=2), 'a', 'b', SEEDS, 300, 0)
    assert (d.low > 0).all() and (d.p <= .05).all() and (d.p >= 2 / 301 - 1e-12).all()


# McNemar

@pytest.mark.parametrize('seed', range(20))
def test_mcnemar_against_scipy_and_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    y, a, b = rng.integers(0, 2, (3, rng.integers(5, 60)))
    only_a, only_b, p = mcnemar(y, a, b)
    table = np.array([[((a == y) & (b == y)).sum(), ((a == y) & (b != y)).sum()], [((a != y) & (b == y)).sum(), ((a != y) & (b != y)).sum()]])
    assert (only_a, only_b) == (table[0, 1], table[1, 0]) and table.sum() == len(y)
    n, k = only_a + only_b, min(only_a, only_b)
    assert p == pytest.approx(binomtest(k, n).pvalue) and p == pytest.approx(min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))
    assert mcnemar(y, b, a) == (only_b, only_a, pytest.approx(p))

def test_network_pairs_show_both_tests_where_they_disagree():
    "Families of five who are right together: McNemar counts 15 witnesses, the bootstrap three."
    family = np.arange(100) // 5
    right = {'a': np.ones(100, bool), 'b': np.ones(100, bool)}
    right['a'][family < 3], right['b'][np.isin(family, [10]) & (np.arange(100) % 5 < 2)] = False, False
    y = family % 2
    pair = pd.DataFrame(dict(patient=family, label=y) | {f'{r}_{s}': np.where(right[r], y, 1 - y) * .8 + .1 for r in 'ab' for s in SEEDS})
    found = network_pairs(pair, 'a', 'b', SEEDS, 500, 0)
    assert list(found.index) == SEEDS and (found.only_a == 2).all() and (found.only_b == 15).all()
    assert np.allclose(found.mcnemar, binomtest(2, 17).pvalue) and np.allclose(found.difference, .13)
    alone = paired_differences(pair, 'a', 'b', [0], 500, 0)
    assert found.bootstrap[0] == alone.p['accuracy'] > .05 > found.mcnemar[0] and not found.agree.any()
    assert show_network_pairs(found, 'without', 'with', 'x').to_html().count('the tests disagree') == 2
    assert network_pairs(pair.assign(patient=range(100)), 'a', 'b', SEEDS, 500, 0).agree.all()

def test_mcnemar_without_disagreement(): assert mcnemar(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([0, 0, 1])) == (0, 0, 1.)


# Errors in common

def test_error_overlap_against_sets():
    pair = made_up(40)
    found = error_overlap(pair, 'ab', SEEDS)
    wrong = {n: set(pair.path[(pair[n] >= .5).astype(int) != pair.label]) for n in ('a_0', 'a_1', 'b_0', 'b_1')}
    assert list(found) == list(wrong) == list(found.index)
    for m in wrong:
        for n in wrong: assert found.loc[m, n] == pytest.approx(len(wrong[m] & wrong[n]) / len(wrong[m] | wrong[n]))

def test_error_overlap_without_errors():
    pair = pd.DataFrame(dict(label=[0, 1], a_0=[.1, .9], b_0=[.6, .9]))
    found = error_overlap(pair, 'ab', [0])
    assert np.isnan(found.loc['a_0', 'a_0']) and found.loc['a_0', 'b_0'] == 0 and found.loc['b_0', 'b_0'] == 1


# Loading

@pytest.fixture
def run(tmp_path):
    "Two experiments of two seeds."
    pair = made_up(12).assign(split='test')
    extra = pd.DataFrame(dict(path=['train/x.jpeg'], patient='q', label=1, split='train'))
    for notebook, r in (('03_train', 'a'), ('04_augment', 'b')):
        step = Step(tmp_path/'run', notebook, {})
        for s in SEEDS: step.write_predictions(pd.concat([pair.assign(probability=pair[f'{r}_{s}']), extra.assign(probability=.5)])[['path', 'patient', 'split', 'label', 'probability']], f'seed_{s}')
    return tmp_path/'run', pair

A, B = ('03_train', ''), ('04_augment', '')

def test_load_recipes(run):
    folder, pair = run
    found = load_recipes(Step(folder, '05_compare', {}), {'a': A, 'b': B}, SEEDS)
    assert list(found) == ['path', 'patient', 'label', 'a_0', 'a_1', 'b_0', 'b_1'] and len(found) == 12
    for c in found: assert (found[c] == pair.sort_values('path')[c].to_numpy()).all()

@pytest.mark.parametrize('how', ['another image', 'one less', 'another label', 'another patient'])
def test_other_images_are_refused(run, how):
    folder, _ = run
    step = Step(folder, '04_augment', {})
    p = step.predictions('04_augment', 'seed_1')
    first = p.index[p.split == 'test'][0]
    if how == 'another image': p.loc[first, 'path'] = 'test/other.jpeg'
    if how == 'one less': p = p.drop(index=first)
    if how == 'another label': p.loc[first, 'label'] = 1 - p.label[first]
    if how == 'another patient': p.loc[first, 'patient'] = 'somebody'
    step.write_predictions(p, 'seed_1')
    with pytest.raises(ValueError, match='04_augment, seed 1: other test images or labels'): load_recipes(Step(folder, '05_compare', {}), {'a': A, 'b': B}, SEEDS)

def test_a_missing_seed_names_the_notebook(run):
    with pytest.raises(MissingUpstream, match='run notebook 04_augment first'): load_recipes(Step(run[0], '05_compare', {}), {'a': A, 'b': ('04_augment', 'photometric')}, [0])


# What one number explains of a change

def families(n): return np.array([f'p{i // 2}' for i in range(n)])

def test_a_number_explains_what_follows_it_and_nothing_else():
    rng = np.random.default_rng(0)
    value, noise = rng.random((2, 500))
    change = (value > .6) + .1 * rng.normal(size=500)
    found = explained(value, change, families(500))
    assert .8 < found < 1 - .01 / change.var(), 'nearly all but the noise'
    assert explained(-np.exp(value), change, families(500)) == pytest.approx(found, abs=.01), 'the order is what counts'
    assert found > explained(value, change + rng.normal(size=500), families(500)) > .02
    assert -.1 < explained(noise, change, families(500)) < .02

def test_a_patient_is_not_explained_by_its_own_images():
    "Each patient's change is its own; fifths that knew its other image would explain some of it."
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(20), 5)
    value, change = (rng.random(20) + 0.)[patient], rng.normal(size=20)[patient]
    assert explained(value, change, patient) < .1 < explained(value, change, np.arange(100))

def test_nothing_to_explain_is_said():
    assert np.isnan(explained(np.arange(10.), np.zeros(10), families(10)))
    assert np.isnan(explained(np.arange(8.), np.arange(8.), families(8)))
