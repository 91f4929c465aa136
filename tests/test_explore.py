"Drawing, counting and measuring before any network."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from cxr_lab.explore import auroc_of, cohens_d, draw_patients, gray_histograms, image_features, plot_class_counts, separability


def test_draw_patients(tiny):
    for label in (0, 1):
        rows = draw_patients(tiny, 'train', label, 4, seed=1)
        assert (tiny.labels[rows] == label).all() and (tiny.index.split[rows] == 'train').all() and tiny.index.patient[rows].nunique() == 4
        assert (rows == draw_patients(tiny, 'train', label, 4, seed=1)).all() and (rows != draw_patients(tiny, 'train', label, 4, seed=2)).any()
    with pytest.raises(ValueError, match='official_val has . patients of class NORMAL, 9 were asked for'): draw_patients(tiny, 'official_val', 0, 9)

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
    assert f.brightness == pytest.approx(.2) and f['lung zones'] == pytest.approx(.2) and f[['contrast', 'sharpness', 'middle minus lung zones', 'contrast in lung zones']].abs().max() < 1e-6
    chest = flat.copy(); chest[..., 24:36] = 204
    assert image_features(chest)['middle minus lung zones'][0] == pytest.approx(.6, abs=1e-3)
    noisy = np.random.default_rng(0).integers(0, 256, (1, 1, 60, 60), np.uint8)
    n = image_features(noisy).iloc[0]
    assert n.sharpness > f.sharpness and n['5th percentile'] == pytest.approx(.05, abs=.02) and n['95th percentile'] == pytest.approx(.95, abs=.02)

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
