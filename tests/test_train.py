"What lesson 03 decides about a training: class weights, steps, averaging, judgement; and its tables."
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from cxr_lab.scores import METRICS, choose_threshold, intervals, score
from cxr_lab.train import (PARTS, adamw, class_weights, judge, one_cycle, running_average,
                           test_table as tabulate, weighted_loss)


# Tables

def test_tables():
    r = pd.DataFrame([{f'test_{k}{s}': .5 for k in METRICS for s in ('', '_at_validation_threshold')}] * 2)
    assert tabulate(r).loc['f1'].tolist() == ['0.500 ± 0.000'] * 2


# Parts

def test_class_weights_make_both_classes_count_the_same():
    labels = np.array([0, 1, 1, 1])
    weights = class_weights(labels)
    assert weights.dtype == torch.float32 and torch.allclose(weights, torch.tensor([2., 2 / 3]))
    assert (np.bincount(labels) * weights.numpy()).round(6).tolist() == [2., 2.]

def test_the_loss_is_the_mean_over_classes_of_the_mean_over_their_images():
    labels, logits = np.array([0, 1, 1, 1]), torch.randn(4, 2, generator=torch.manual_seed(0))
    y = torch.from_numpy(labels)
    each = torch.nn.functional.cross_entropy(logits, y, reduction='none')
    expected = (each[y == 0].mean() + each[y == 1].mean()) / 2
    assert torch.allclose(weighted_loss(labels)(logits, y), expected)

def test_adamw_decays_weights_apart_from_the_gradient():
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = adamw([w], .1, .5)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == pytest.approx(1 - .1 * .5)

@pytest.mark.parametrize('steps', [1, 4, 5, 100])
def test_one_cycle_peaks_after_a_quarter(steps):
    optimizer = adamw([torch.nn.Parameter(torch.zeros(1))], .2, 0)
    schedule, rates = one_cycle(optimizer, .2, steps), []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) <= .2 + 1e-12
    if steps == 100: assert np.argmax(rates) == 24 and rates[24] == pytest.approx(.2) and rates[-1] < 1e-5

def test_the_average_forgets():
    mean, n = torch.tensor(5.), torch.tensor(0)
    assert running_average(mean, torch.tensor(7.), n) == 7, 'the first one counts whole'
    assert running_average(mean, torch.tensor(6.), torch.tensor(10)) == 5.5
    assert running_average(mean, torch.tensor(6.), torch.tensor(10**6)).item() == pytest.approx(5.01)

def test_the_judge_says_what_scikit_learn_says():
    rng, n = np.random.default_rng(0), 400
    label = (rng.random(n) < .6).astype(int)
    split = np.repeat(['train', 'validation', 'test', 'official_val'], n // 4)
    p = pd.DataFrame(dict(path=[f'{i}' for i in range(n)], patient=[f'p{i // 2}' for i in range(n)],
                          split=split, label=label,
                          probability=np.clip(rng.normal(.4 + .2 * label, .2), 0, 1)))
    metrics, facts = judge(p)
    v, t = p[p.split == 'validation'], p[p.split == 'test']
    assert metrics['n'] == 100 and metrics['threshold'] == choose_threshold(v.label, v.probability)
    assert metrics['val_auroc'] == pytest.approx(sk.roc_auc_score(v.label, v.probability))
    assert metrics['test_f1'] == pytest.approx(sk.f1_score(t.label, t.probability >= .5))
    chosen = t.probability >= metrics['threshold']
    assert metrics['test_recall_at_validation_threshold'] == sk.recall_score(t.label, chosen)
    assert metrics['test_brier'] == pytest.approx(((t.probability - t.label) ** 2).mean())
    for k, (low, high) in intervals(t).items():
        assert (metrics[f'test_{k}_low'], metrics[f'test_{k}_high']) == (low, high)
    at_half = score(t.label, t.probability)
    assert facts == {'threshold': metrics['threshold'], 'test': at_half}
    assert all(metrics[f'test_{k}'] == v for k, v in at_half.items())

def test_the_parts_are_named(): assert repr(PARTS).startswith('Parts(build_model, weighted_loss, adamw')
