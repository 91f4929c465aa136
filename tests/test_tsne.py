"Embeddings, maps, their numbers, and the interactive page in a real browser."
import os, subprocess, sys, threading

import numpy as np
import pytest
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

import site_check
from cxr_lab.model import build_model
from cxr_lab.networks import predict, to_float
from cxr_lab.runs import CLASSES
from cxr_lab.explorable import plot_maps, vectors_of
from cxr_lab.tsne import (PALETTES, agreement, embed, groups_of, head_of, inputs_of, nearest_training, pca_map, read_off, separation,
                          told_apart, tsne_map)
from maps import small, table

@pytest.fixture(scope='module')
def blobs():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=(60, 8)) + c for c in (0, 6)]).astype(np.float32), np.repeat([0, 1], 60)


# Embeddings

@pytest.mark.parametrize('batch_size', [1, 7, 256])
def test_embeddings_are_the_models_own(tiny, small, batch_size):
    vectors, probability = embed(small, tiny.pixels[:20], batch_size)
    with torch.no_grad(): own = small.embed(to_float(torch.from_numpy(tiny.pixels[:20]))).numpy()
    assert vectors.dtype == np.float32 and np.allclose(vectors, own, atol=1e-5)
    assert probability.dtype == np.float64 and np.allclose(probability, predict(small, tiny.pixels[:20]), atol=1e-6)

@pytest.mark.parametrize('function', [embed, predict])
def test_the_number_of_cores_does_not_change_a_bit(tiny, small, monkeypatch, function):
    "And every core gets a batch: four calls of the network are under way at once."
    together, found = threading.Barrier(4), []
    def meet(*call): together.wait(60)
    for n in (1, 4):
        monkeypatch.setenv('CXR_LAB_CORES', str(n))
        hook = small.register_forward_hook(meet) if n == 4 else None
        try: told = function(small, tiny.pixels, 50)
        finally:
            if hook: hook.remove()
        found.append(told if function is embed else (told,))
    for one, four in zip(*found): assert np.array_equal(one, four)

@pytest.mark.parametrize('name, width', [('resnet18', 512), ('mobilenet_v3_small', 1024), ('swin_t', 768)])
def test_embeddings_of_other_networks(name, width):
    model = build_model(name).train()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8)
    vectors, probability = embed(model, pixels)
    assert vectors.shape == (2, width) and model.training
    with torch.no_grad(): again = head_of(model)(torch.from_numpy(vectors)).double().softmax(1)[:, 1].numpy()
    assert np.allclose(again, probability, atol=1e-5)

def test_the_hook_is_gone_whatever_happens(small):
    def hooks(): return sum(len(m._forward_pre_hooks) for m in small.modules())
    with pytest.raises(KeyboardInterrupt), inputs_of(small.head):
        assert hooks() == 1
        raise KeyboardInterrupt
    small.train()
    with pytest.raises(TypeError): embed(small, np.zeros((1, 1, 32, 32), np.float32))
    assert hooks() == 0 and small.training
    small.eval()

def test_networks_without_an_embedding_say_so():
    with pytest.raises(ValueError, match='no linear layer'): embed(nn.Conv2d(1, 2, 3), np.zeros((1, 1, 8, 8), np.uint8))
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(64, 2)
        def forward(self, x): return self.head(x.flatten(1)) + self.head(1 - x.flatten(1))
    class PerPatch(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(8, 2)
        def forward(self, x): return self.head(x[:, 0]).mean(1)
    for model in (Twice(), PerPatch()):
        with pytest.raises(ValueError, match='once per batch'): embed(model, np.zeros((2, 1, 8, 8), np.uint8))
        assert not head_of(model)._forward_pre_hooks

# Maps

def test_the_same_seed_gives_the_same_map(blobs):
    here = tsne_map(blobs[0], 10, seed=3)
    assert here.shape == (120, 2) and here.dtype == np.float32 and np.array_equal(here, tsne_map(blobs[0], 10, seed=3))
    assert not np.array_equal(here, tsne_map(blobs[0], 10, seed=3, init='random')) and not np.array_equal(tsne_map(blobs[0], 10, 1, 'random'), tsne_map(blobs[0], 10, 2, 'random'))

def on_other_cores(vectors, threads, folder):
    "The map of another process with another number of threads."
    np.save(folder/'x.npy', vectors)
    code = f'import numpy as np; from cxr_lab.tsne import tsne_map; np.save({str(folder/"y.npy")!r}, tsne_map(np.load({str(folder/"x.npy")!r}), 10, seed=3))'
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'OMP_NUM_THREADS': threads, 'OPENBLAS_NUM_THREADS': threads, 'PYTHONPATH': os.pathsep.join([str(site_check.ROOT), os.environ.get('PYTHONPATH', '')])})
    return np.load(folder/'y.npy')

def test_on_any_number_of_cores(table, tmp_path): assert np.array_equal(tsne_map(vectors_of(table), 10, seed=3), on_other_cores(vectors_of(table), '5', tmp_path))

@pytest.mark.slow
@pytest.mark.parametrize('threads', ['1', '5'])
def test_large_maps_on_any_number_of_cores(tmp_path, threads):
    many = np.random.default_rng(0).normal(size=(2500, 96)).astype(np.float32)
    assert np.array_equal(tsne_map(many, 10, seed=3), on_other_cores(many, threads, tmp_path))

def test_it_is_scikit_learns_map(blobs):
    theirs = TSNE(2, perplexity=10, init='pca', random_state=0).fit_transform(blobs[0])
    ours = tsne_map(blobs[0], 10, seed=0)
    near, far = agreement(ours, theirs, 10)
    assert near > .6 and far > .8  # not equal: the order of sums differs

@pytest.mark.parametrize('perplexity', [0, .5, 40, 1000, float('nan')])
def test_impossible_perplexities(blobs, perplexity):
    with pytest.raises(ValueError, match='perplexity'): tsne_map(blobs[0], perplexity)

def test_pca_is_a_projection(blobs):
    flat = pca_map(blobs[0])
    from scipy.spatial.distance import pdist
    assert (pdist(flat) <= pdist(blobs[0]) + 1e-3).all() and abs(np.cov(flat.T)[0, 1]) < 1e-3
    line = np.outer(np.arange(5.), [3, 4])
    assert np.allclose(np.abs(np.diff(pca_map(line)[:, 0])), 5, atol=1e-5) and np.allclose(pca_map(line)[:, 1], 0, atol=1e-5)

def test_agreement(blobs):
    v, _ = blobs
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert agreement(v, -2.5 * v @ rotation + 7, 10) == pytest.approx((1, 1), abs=1e-3)
    near, far = agreement(v, np.random.default_rng(1).normal(size=(120, 3)), 10)
    assert near == pytest.approx(10 / 119, abs=.04) and abs(far) < .06
    a, b = v, pca_map(v)
    slow = np.mean([len({*np.argsort(np.linalg.norm(a - a[i], axis=1), kind='stable')[1:6]} & {*np.argsort(np.linalg.norm(b - b[i], axis=1), kind='stable')[1:6]}) / 5 for i in range(120)])
    assert agreement(a, b, 5)[0] == pytest.approx(slow, abs=.01)
    with pytest.raises(ValueError): agreement(v, v[:-1])
    with pytest.raises(ValueError): agreement(v[:10], v[:10], 10)


# Numbers

def test_separation(blobs):
    v, y = blobs
    half = np.arange(120) % 2 == 0
    s = separation(v[half], y[half], v[~half], y[~half], 5)
    assert s['neighbors'] == s['straight_cut'] == s['auroc'] == 1 and s['silhouette'] == pytest.approx(silhouette_score(v[~half], y[~half]))
    turned = separation(v[half], y[half], v[~half], 1 - y[~half], 5)
    assert turned['neighbors'] == 0 and turned['auroc'] == 0 and turned['silhouette'] == pytest.approx(s['silhouette'])
    ring = np.concatenate([r * np.c_[np.cos(a), np.sin(a)] for r, a in ((1, np.linspace(0, 6, 60)), (9, np.linspace(0, 6, 60)))])
    s = separation(ring[half], y[half], ring[~half], y[~half], 5)
    assert s['neighbors'] == 1 and s['auroc'] < .7, 'a ring around the other class: neighbors know, a straight cut does not'

def test_separation_of_the_missing_is_undefined(blobs):
    v, y = blobs
    for a, b in ((y, y * 0), (y * 0, y)): assert set(separation(v, a, v, b).values()) == {None}

def test_told_apart(blobs):
    v, y = blobs
    assert told_apart(v, y == 1, np.arange(120)) == 1
    rng = np.random.default_rng(3)
    same, other = rng.normal(size=(300, 4)), rng.random(300) < .3
    assert told_apart(same, other, np.arange(300)) == pytest.approx(.5, abs=.12)
    assert told_apart(same, other, np.arange(300), seed=1) == told_apart(same, other, np.arange(300), seed=1)
    assert told_apart(v[:4], y[:4] == 1, np.arange(4)) is None and told_apart(v[:20], np.arange(20) < 3, np.arange(20)) is None

def test_what_can_be_read_off(blobs):
    v, y = blobs
    own = np.arange(120)
    assert read_off(v, v @ np.arange(8), own) > .99
    noise = np.random.default_rng(1).normal(size=120)
    assert read_off(v, noise, own) < .1, 'no better than the mean'
    twins, value = np.repeat(np.random.default_rng(2).normal(size=(40, 60)), 3, 0), np.repeat(noise[:40], 3)
    assert read_off(twins, value, own) > .9 and read_off(twins, value, own // 3) < .3, 'images of one patient stay together'
    assert read_off(v[:4], noise[:4], np.arange(4)) is None

def test_nearest_training_images(blobs):
    v, _ = blobs
    train, rows = np.arange(0, 120, 2), np.array([1, 7, 119])
    near, d = nearest_training(v, train, rows, 4)
    for i, n, x in zip(rows, near, d):
        order = sorted(train, key=lambda t: np.linalg.norm(v[t] - v[i]))[:4]
        assert n.tolist() == order and np.allclose(x, [np.linalg.norm(v[t] - v[i]) for t in order], rtol=1e-4)
    with pytest.raises(ValueError, match='training images themselves'): nearest_training(v, train, np.array([1, 2]))


# Drawing

def test_every_image_has_a_group_and_every_group_a_color(table):
    for by in PALETTES: assert set(groups_of(table, by)) <= set(PALETTES[by]) and len(groups_of(table, by)) == len(table)
    assert (groups_of(table, 'class') == table.label.map(dict(enumerate(CLASSES)))).all()
    t = table.assign(label=[0, 0, 1, 1] * 50, prediction=[0, 1, 0, 1] * 50, subtype='')
    assert groups_of(t, 'answer').tolist()[:4] == ['right', 'false positive', 'false negative', 'right']
    assert groups_of(t, 'subtype').tolist()[:4] == ['normal', 'normal', 'not known', 'not known']
    fifths = groups_of(table, 'proportion')
    assert (fifths == 'not measured').sum() == 20 and fifths.value_counts().drop('not measured').tolist() == [36] * 5
    assert fifths.iloc[1] == 'narrowest fifth' and fifths.iloc[-1] == 'widest fifth'
    with pytest.raises(ValueError, match='class, proportion, subtype, split, answer'): groups_of(table, 'age')

def test_maps_are_drawn_with_all_points(table):
    import matplotlib.pyplot as plt
    xy = {'a': np.random.default_rng(0).normal(size=(len(table), 2)), 'b': np.zeros((len(table), 2))}
    for by in PALETTES:
        groups = groups_of(table, by)
        fig = plot_maps(xy, dict.fromkeys('ab', groups), PALETTES[by], {'a': 'A', 'b': 'B'}, 'all')
        assert [sum(len(line.get_xdata()) for line in ax.lines) for ax in fig.axes] == [len(table), len(table), 0] and [ax.get_title() for ax in fig.axes] == ['A', 'B', '']
        assert [text.get_text() for text in fig.axes[-1].get_legend().texts] == [g for g in PALETTES[by] if g in set(groups)]
        plt.close(fig)
