"What lesson 03 decides about a training: class weights, steps, averaging, judgement; and its tables."
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from cxr_lab import train
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


# The knob of the puzzle

def disk(size=64, radius=12):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (255 * (x**2 + y**2 < radius**2)).astype(np.uint8)[None, None]

def extent(image):
    "Width and height of what is bright."
    bright = image[0] > 127
    return np.array([np.ptp(bright.any(axis).nonzero()[0]) + 1 for axis in (0, 1)])

@pytest.mark.parametrize('factor', [.64, .9, 1.2, 1.5625])
def test_stretching_changes_the_proportion_and_not_the_area(factor):
    before, after = extent(disk()[0]), extent(train.stretch(disk(), factor)[0])
    assert after == pytest.approx(before * [factor**.5, factor**-.5], abs=1)

def test_each_image_is_stretched_by_its_own_factor_and_by_1_not_at_all():
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 40, 40), np.uint8)
    assert np.array_equal(train.stretch(images, 1), images)
    mixed = train.stretch(images, np.array([1, .8, 1.3]))
    assert np.array_equal(mixed[0], images[0]) and mixed.dtype == np.uint8
    for i, factor in ((1, .8), (2, 1.3)): assert np.array_equal(mixed[i], train.stretch(images[i:i + 1], factor)[0])

def test_what_comes_in_at_an_edge_repeats_it():
    image = np.tile(np.arange(100, 164, dtype=np.uint8), (64, 1))
    small = train.magnify(image, .5, .5)
    assert (small[:, :10] == 100).all() and (small[:, -10:] == 163).all() and abs(int(small[32, 32]) - 132) <= 1

def test_the_knob_scores_every_network_at_every_factor():
    class Bright(torch.nn.Module):
        "Ill if the middle column of the image is mostly bright."
        def __init__(self, least):
            super().__init__()
            self.least = torch.nn.Parameter(torch.tensor(least))
        def forward(self, x):
            score = 50 * (x[:, 0, :, x.shape[3] // 2].mean(1) - self.least)
            return torch.stack([-score, score], 1)
    images, labels = np.concatenate([disk(radius=8), disk(radius=20)]), np.array([0, 1])
    knob = train.turn_knob([Bright(.5), Bright(.1)], images, labels, train.stretch, (.5, 1))
    assert knob.factor.tolist() == [.5, .5, 1, 1] and knob.network.tolist() == [0, 1, 0, 1]
    assert knob.recall.tolist() == [1, 1, 1, 1] and knob.specificity.tolist() == [1, 0, 1, 0]
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    train.plot_knob(ax, knob, 'title', 'factor')
    assert [t.get_text() for t in ax.legend().get_texts()] == ['NORMAL: specificity', 'PNEUMONIA: recall']
    plt.close(fig)
