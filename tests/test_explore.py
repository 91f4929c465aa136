"Drawing, counting and measuring before any network."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from cxr_lab.data import Dataset
from cxr_lab.explore import (auroc_of, carried_over, cohens_d, deal_anew, draw_patients, gray_histograms, image_features,
                             lung_box, lung_boxes, narrower, plot_class_counts, separability)
from cxr_lab.lungs import pack


def test_draw_patients(tiny):
    for label in (0, 1):
        rows = draw_patients(tiny, 'train', label, 4, seed=1)
        assert (tiny.labels[rows] == label).all() and (tiny.index.split[rows] == 'train').all() and tiny.index.patient[rows].nunique() == 4
        assert (rows == draw_patients(tiny, 'train', label, 4, seed=1)).all() and (rows != draw_patients(tiny, 'train', label, 4, seed=2)).any()
    with pytest.raises(ValueError, match='official_val has . patients of class NORMAL, 9 were asked for'): draw_patients(tiny, 'official_val', 0, 9)

def test_draw_patients_of_one_kind(tiny):
    kind = np.where(tiny.labels == 1, np.where(np.arange(len(tiny.labels)) % 3, 'virus', 'bacteria'), '')
    data = Dataset(tiny.index.assign(subtype=kind), tiny.pixels, tiny.source)
    for subtype in ('bacteria', 'virus'):
        rows = draw_patients(data, 'train', 1, 3, 0, subtype)
        assert list(data.index.subtype[rows]) == [subtype] * 3 and data.index.patient[rows].nunique() == 3
    with pytest.raises(ValueError, match='0 patients of class NORMAL, 1 were asked for'): draw_patients(data, 'train', 0, 1, 0, 'virus')

def test_class_counts_show_the_numbers():
    import matplotlib.pyplot as plt
    index = pd.DataFrame(dict(folder=['train'] * 5 + ['test'] * 3, label=[1, 1, 1, 0, 0, 1, 0, 0]))
    fig = plot_class_counts(index, 'folder', ['train', 'test'], 'title')
    assert [a.get_title() for a in fig.axes] == ['train: 60.0% pneumonia', 'test: 33.3% pneumonia']
    assert [[p.get_height() for p in a.patches] for a in fig.axes] == [[2, 3], [2, 1]] and [[t.get_text() for t in a.texts] for a in fig.axes] == [['2', '3'], ['2', '1']]
    plt.close(fig)

def test_auroc_is_the_rank_statistic():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        y, v = rng.integers(0, 2, 40), np.round(rng.normal(size=40), 1)
        assert auroc_of(v, y) == pytest.approx(mannwhitneyu(v[y == 1], v[y == 0]).statistic / (y.sum() * (1 - y).sum()))
    assert auroc_of(np.arange(3), np.ones(3)) == .5

def test_gray_histograms(tiny):
    h = gray_histograms(tiny.pixels[:5], 16)
    assert h.shape == (5, 16) and np.allclose(h.sum(1), 1)
    for i in range(5): assert np.allclose(h[i], np.histogram(tiny.pixels[i], 16, (0, 256))[0] / 1024)

def test_image_features_of_plain_images():
    flat = np.full((1, 1, 60, 60), 51, np.uint8)
    f = image_features(flat).iloc[0]
    assert list(f.index) == ['brightness', 'contrast', '5th percentile', '95th percentile', 'sharpness']
    assert f.brightness == pytest.approx(.2) and f[['contrast', 'sharpness']].abs().max() < 1e-6
    noisy = np.random.default_rng(0).integers(0, 256, (1, 1, 60, 60), np.uint8)
    n = image_features(noisy).iloc[0]
    assert n.sharpness > f.sharpness and n['5th percentile'] == pytest.approx(.05, abs=.02) and n['95th percentile'] == pytest.approx(.95, abs=.02)

def test_image_features_do_not_know_where_anything_is():
    "Blocks of an image that change places leave all but the sharpness at their borders as it was."
    image = np.random.default_rng(1).integers(0, 256, (64, 64)).astype(np.uint8)
    moved = np.roll(image, (32, 20), (0, 1))
    a, b = image_features(np.stack([image, moved])[:, None]).to_numpy()
    assert np.allclose(a[:4], b[:4]) and a[4] == pytest.approx(b[4], rel=.02)

def two_lungs(left, top, width, height, size=64):
    mask = np.zeros((size, size), bool)
    mask[top:top + height, left:left + width] = True
    mask[:, left + width // 2 - 1:left + width // 2 + 1] = False
    return mask

def test_the_box_around_lungs():
    for box in ((3, 10, 40, 50), (0, 0, 64, 64), (20, 5, 30, 12)):
        assert lung_box(two_lungs(*box)) == tuple(v / 64 for v in box)

def test_boxes_of_all_masks_and_none_where_there_are_no_lungs():
    masks = pack([two_lungs(3, 10, 40, 50), np.zeros((64, 64), bool), two_lungs(0, 0, 32, 64)])
    boxes = lung_boxes(masks)
    assert boxes.proportion.tolist()[::2] == [.8, .5] and boxes.iloc[1].isna().all()
    assert (boxes.width / boxes.height).equals(boxes.proportion)

def test_narrower_is_the_chance_that_the_ill_one_has_the_smaller_number():
    chests = pd.DataFrame(dict(proportion=[1.1, 1.0, .8, .9, np.nan, 5], height=[1, 2, 3, 4, 5, 0]))
    labels, rows = np.array([0, 0, 1, 1, 1, 1]), np.arange(5)
    assert narrower(chests, labels, rows) == 1 and narrower(chests, labels, rows, 'height') == 0
    assert narrower(chests, labels, np.arange(6)) == pytest.approx(2 / 3)
    assert narrower(chests, labels, np.array([0, 4])) == .5, 'one class is left'

def test_cohens_d():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 2, 4000), rng.normal(1, 2, 6000)
    assert cohens_d(a, b) == pytest.approx(.5, abs=.05) == -cohens_d(b, a) and cohens_d(np.ones(3), np.ones(3)) == 0

def test_separability():
    rng = np.random.default_rng(0)
    target, groups = np.arange(200) % 2, np.arange(200) // 4
    assert separability(pd.DataFrame(rng.normal(size=(200, 3))), target, groups) == pytest.approx(.5, abs=.15)
    assert separability(pd.DataFrame(rng.normal(size=(200, 3)) + 2 * target[:, None]), target, groups) > .95
    leak = rng.normal(size=(50, 40)).repeat(4, 0)  # features that only say which patient it is
    assert separability(pd.DataFrame(leak), (groups % 2), groups) < .75, 'patients are kept together'

def test_labels_dealt_anew_belong_to_patients():
    patients = np.repeat(list('abcdefghij'), [1, 5, 2, 3, 1, 1, 4, 2, 2, 1])
    labels = np.isin(patients, list('abcd')).astype(int)
    dealt = [deal_anew(labels, patients, seed) for seed in range(20)]
    for d in dealt:
        own = pd.Series(d).groupby(patients).nunique()
        assert (own == 1).all() and pd.Series(d).groupby(patients).first().sum() == 4, 'as many ill patients as before'
    assert (dealt[0] == deal_anew(labels, patients, 0)).all() and len({tuple(d) for d in dealt}) > 10

def test_what_is_learned_in_train_is_asked_elsewhere(tiny):
    labels = tiny.labels
    rng = np.random.default_rng(0)
    noise = rng.normal(size=len(labels))
    test = (tiny.index.split == 'test').to_numpy()
    clue = pd.DataFrame({'clue': np.where(test, -labels, labels) + .1 * noise})  # turned round in test
    told = carried_over(clue, tiny, labels)
    assert list(told) == ['train', 'validation', 'test']
    assert told['train'] > .99 and told['validation'] > .99 and told['test'] < .01
