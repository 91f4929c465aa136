"What is unusual for a model: features, thresholds, reasons, files; and the statistics that ship."
import hashlib, json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import mahalanobis
from scipy.stats import norm
from sklearn.covariance import LedoitWolf

import cxr_lab
from cxr_lab import unusual
from cxr_lab.data import Dataset, index_images, split_validation
from cxr_lab.images import Source, pixel_cache
from cxr_lab.model import build_model, load_model
from cxr_lab.runs import read_json
from cxr_lab.tsne import embed
from cxr_lab.unusual import (POSES, Unusual, choose_thresholds, fit_unusual, layout, pose,
                             standard_size, texture_and_values, weights_digest)

WEIGHTS = Path(cxr_lab.__file__).parent/'weights'

@pytest.fixture(scope='module')
def data(phantom_images):
    index = split_validation(index_images(phantom_images)[0])
    return Dataset(index, pixel_cache(phantom_images, index, 64), Source('phantom', phantom_images))

@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return build_model('small').eval()

@pytest.fixture(scope='module')
def usual(network, data): return fit_unusual(network, data)

@pytest.fixture(scope='module')
def test(data): return np.array(data.pixels[data.rows('test')])

def reasons(usual, network, pixels, **options):
    pixels = np.ascontiguousarray(pixels)
    return usual.reasons(pixels, embed(network, pixels)[0], **options)


# Features

def random_images(n=5, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, 128, 128), dtype=np.uint8)

def test_layout_is_the_normal_score_of_each_blocks_rank():
    image = random_images(1)[0]
    means = [image[r:r + 8, c:c + 8].mean() for r in range(0, 128, 8) for c in range(0, 128, 8)]
    ranks = [sum(m < o for m in means) + (1 + sum(m == o for m in means)) / 2 for o in means]
    assert np.allclose(layout(image[None])[0], norm.ppf(np.array(ranks) / 257), atol=1e-5)

@pytest.mark.parametrize('which', range(16))
def test_a_pose_is_what_its_name_says(which):
    "The layout of a turned image is the turned layout, and undoing gives it back."
    images, name = random_images(), POSES[which]
    made = 255 - images if 'inverted' in name else images
    if 'mirrored' in name or 'upside down' in name: made = made[:, :, ::-1]
    if 'left' in name: made = np.rot90(made, 1, (1, 2))
    if '180' in name or 'upside down' in name: made = np.rot90(made, 2, (1, 2))
    if 'right' in name: made = np.rot90(made, 3, (1, 2))
    seen = layout(images)
    assert np.allclose(layout(np.ascontiguousarray(made)), pose(seen, which), atol=1e-4)
    assert np.array_equal(pose(pose(seen, which), which, undo=True), seen)

def test_names_of_poses_differ():
    assert len(set(POSES)) == 16 and POSES[0] == '' and not any(',' in p and 'mirrored' not in p for p in POSES)
    left = np.zeros((1, 128, 128), np.uint8); left[:, :, :64] = 200  # a bright left half, upside down: still left
    assert layout(left[:, ::-1]).tolist() == pose(layout(left), POSES.index('upside down')).tolist()

def test_texture_by_hand():
    image = np.zeros((1, 128, 128), np.uint8)
    image[:, :, ::2] = 100  # columns that alternate: detail of the finest scale, in one direction only
    texture, values = texture_and_values(image)
    contrast = 50 + 1
    fine = texture.reshape(3, 3, 16)[0]
    assert np.allclose(fine[0], np.log(50 / contrast + .002), atol=1e-4) and np.allclose(texture.reshape(9, 16)[1:], np.log(.002), atol=1e-4)
    assert values[0, 3] == pytest.approx(np.log(contrast)) and values[0, 8] == pytest.approx(np.sqrt(.5))  # half of it is black
    assert values[0, 6] == pytest.approx(np.log(2), abs=1e-4) and values[0, 7] == pytest.approx(np.log(.5))

def test_values_of_a_histogram():
    image = random_images(1, 3)
    v, x = texture_and_values(image)[1][0], image.ravel()
    low, first, middle, third, high = (np.sort(x)[int(np.ceil(q * x.size)) - 1] for q in (.02, .25, .5, .75, .98))
    assert v[3] == pytest.approx(np.log(x.std() + 1), abs=1e-5)
    assert v[4] == pytest.approx((int(middle) - low) / (int(high) - low + 1), abs=1e-6) and v[5] == pytest.approx((int(third) - first) / (int(high) - low + 1), abs=1e-6)

def test_batches_do_not_matter():
    images = random_images(21)
    whole, one = texture_and_values(images, 21), [np.concatenate(a) for a in zip(*(texture_and_values(images[i:i + 1]) for i in range(21)))]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(whole, one))
    assert [a.shape for a in texture_and_values(images[:0])] == [(0, 144), (0, 9)]

@pytest.mark.parametrize('size', [32, 128, 300])
def test_any_size(size):
    y, x = np.mgrid[:size, :size] / size
    smooth = (200 * x * y).astype(np.uint8)[None, None]
    assert standard_size(smooth).shape == (1, 128, 128) and standard_size(smooth[:0]).shape == (0, 128, 128)
    assert np.corrcoef(layout(standard_size(smooth)), layout(standard_size((200 * np.multiply(*np.mgrid[:128, :128] / 128)).astype(np.uint8)[None, None])))[0, 1] > .99

@pytest.mark.parametrize('pixels', [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 1, 8, 8), np.float32), np.zeros((2, 3, 8, 8), np.uint8)])
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match='N,1,H,W'): standard_size(pixels)


# Distances and thresholds

def test_distance_is_mahalanobis_to_the_nearer_center():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    groups = np.repeat([0, 1], 150)
    features[150:] += 5
    centers, factor = unusual._fit_distance(features, groups)
    around = features - np.stack([features[groups == g].mean(0) for g in (0, 1)])[groups]
    precision = LedoitWolf(assume_centered=True).fit(around).precision_
    expected = [min(mahalanobis(x, features[groups == g].mean(0), precision) for g in (0, 1)) for x in features[::25]]
    assert np.allclose(unusual._distance(features[::25], centers, factor), expected, rtol=1e-4)

@pytest.mark.parametrize('share', [.001, .03, .3])
def test_thresholds_are_one_quantile_and_use_the_share(share):
    rng = np.random.default_rng(0)
    scores = {'a': rng.normal(size=4000), 'b': rng.exponential(size=4000), 'c': rng.normal(size=4000)}
    t = choose_thresholds(scores, share)
    beyond = {k: (scores[k] > t[k]).sum() for k in t}
    assert len(set(beyond.values())) == 1
    warned = np.any([scores[k] > t[k] for k in t], 0).mean()
    assert share - 3/4000 <= warned <= share

def test_thresholds_when_all_are_alike():
    assert choose_thresholds({'a': np.ones(50), 'b': np.arange(50.)}, .1) == {'a': 1., 'b': 44.}


# Reasons, on phantoms with a network that has learnt nothing

def test_usual_images_are_left_alone(usual, network, data):
    assert np.mean([bool(r) for r in reasons(usual, network, data.pixels[data.rows('train')])]) <= .05
    assert np.mean([bool(r) for r in reasons(usual, network, data.pixels[data.rows('validation')])]) <= .2  # 10 images

@pytest.mark.parametrize('name, change, text', [
    ('inverted', lambda x: 255 - x, 'seems inverted'), ('left', lambda x: np.rot90(x, 1, (2, 3)), 'seems turned 90° to the left'), ('right', lambda x: np.rot90(x, 3, (2, 3)), 'seems turned 90° to the right')])
def test_wrong_poses_are_named(usual, network, test, name, change, text):
    assert np.mean([text in r for r in reasons(usual, network, change(test))]) > .7

@pytest.mark.parametrize('name', ['noise', 'page', 'gradient'])
def test_no_x_rays(usual, network, name):
    rng = np.random.default_rng(0)
    made = dict(noise=rng.integers(0, 256, (20, 1, 64, 64)), page=np.where(rng.random((20, 1, 64, 8)) < .4, 20, 250).repeat(8, 3), gradient=np.broadcast_to(np.arange(0, 256, 4), (20, 1, 64, 64)))[name]
    found = reasons(usual, network, made.astype(np.uint8))
    assert all(found) and all('unlike' in r or 'seems' in r for r in found)

@pytest.mark.parametrize('level', [0, 128, 255])
def test_blank_is_called_blank(usual, network, level): assert reasons(usual, network, np.full((2, 1, 64, 64), level, np.uint8)) == ['blank'] * 2

def test_masks_are_judged_only_if_given(usual, network, test):
    pixels = test[:2]
    before = reasons(usual, network, pixels)
    masks = np.zeros((2, 64, 64), bool)
    masks[1, 10:50, 6:28] = masks[1, 10:50, 36:58] = True
    with_masks = reasons(usual, network, pixels, masks=masks)
    assert with_masks[0].endswith('no plausible lungs (empty)') and with_masks[1] == before[1]
    with pytest.raises(ValueError, match='1 masks for 2'): reasons(usual, network, pixels, masks=masks[:1])

def test_one_by_one_or_together(usual, network, test):
    vectors = embed(network, test)[0]
    assert sum((usual.reasons(test[i:i + 1], vectors[i:i + 1]) for i in range(len(test))), []) == usual.reasons(test, vectors)
    assert usual.reasons(test[:0], vectors[:0]) == []
    with pytest.raises(ValueError, match='embeddings of this model'): usual.reasons(test, vectors[:, :5])

def test_known_strangers_are_named(network, data):
    stripes = np.array(data.pixels[data.rows('train')][:40])
    stripes[..., ::4] //= 2
    usual = fit_unusual(network, data, strangers={'striped film': stripes})
    other = np.array(data.pixels[data.rows('test')])
    striped = other.copy(); striped[..., ::4] //= 2
    assert usual.info['strangers'] == ['striped film'] and 'like a striped film' in usual.info['thresholds']
    assert np.mean(usual.scores(striped, embed(network, striped)[0])['like a striped film'] > usual.info['thresholds']['like a striped film']) > .8
    assert np.mean(usual.scores(other, embed(network, other)[0])['like a striped film'] > usual.info['thresholds']['like a striped film']) < .2

def test_fitting_is_reproducible_and_leaves_the_generator_alone(usual, network, data):
    torch.manual_seed(5); before = torch.random.get_rng_state()
    again = fit_unusual(network, data)
    assert torch.equal(torch.random.get_rng_state(), before) and again.info == usual.info
    assert all(np.array_equal(again.tensors[k], v) for k, v in usual.tensors.items())

def test_a_share_is_a_share(network, data):
    with pytest.raises(ValueError, match='between 0 and 1'): fit_unusual(network, data, false_warnings=0)


# Files

@pytest.fixture
def file(usual, tmp_path):
    usual.save(tmp_path/'m.usual.safetensors')
    return tmp_path/'m.usual.safetensors'

def test_a_file_gives_back_the_same(usual, file, network, test):
    again = Unusual.load(file, network)
    assert again.info == usual.info and reasons(again, network, test) == reasons(usual, network, test)

def test_of_another_model(file):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match='another model'): Unusual.load(file, build_model('small'))

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'x\.safetensors'") as e: Unusual.load(tmp_path/'x.safetensors')
    assert str(tmp_path) not in str(e.value)

def change_meta(file, change):
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: meta = f.metadata()
    info = json.loads(meta[unusual._FORMAT]); change(info)
    save_file(load_file(file), file, {unusual._FORMAT: json.dumps(info)})

@pytest.mark.parametrize('name, damage, match', [
    ('pickle', lambda f: torch.save({'a': 1}, f), 'no safetensors file'), ('cut', lambda f: f.write_bytes(f.read_bytes()[:-100]), 'cut off'), ('empty', lambda f: f.write_bytes(b''), 'cut off'),
    ('foreign', lambda f: save_file({'x': torch.zeros(2)}, f), 'does not say what is usual'), ('no JSON', lambda f: save_file({'x': torch.zeros(2)}, f, {unusual._FORMAT: '{'}), 'damaged'),
    ('a list', lambda f: save_file({'x': torch.zeros(2)}, f, {unusual._FORMAT: '[]'}), 'damaged'),
    ('tensor missing', lambda f: (lambda t, m: (t.pop('pose.weights'), save_file(t, f, m)))(load_file(f), {unusual._FORMAT: json.dumps(Unusual.load(f).info)}), 'pose.weights is missing'),
    ('shape', lambda f: (lambda t, m: save_file(t | {'layout.factor': torch.eye(5)}, f, m))(load_file(f), {unusual._FORMAT: json.dumps(Unusual.load(f).info)}), 'layout.factor has another shape'),
    ('NaN', lambda f: (lambda t, m: save_file(t | {'pose.constants': t['pose.constants'] * np.nan}, f, m))(load_file(f), {unusual._FORMAT: json.dumps(Unusual.load(f).info)}), 'not finite'),
    ('threshold', lambda f: change_meta(f, lambda i: i['thresholds'].pop('pose')), 'thresholds of other checks'), ('limits', lambda f: change_meta(f, lambda i: i['mask_limits'].pop('area')), 'damaged'),
    ('word', lambda f: change_meta(f, lambda i: i['thresholds'].update(pose='high')), 'damaged'),
    ('stranger', lambda f: change_meta(f, lambda i: (i['strangers'].append('x'), i['thresholds'].update({'like a x': 1}))), 'x.weights is missing')])
def test_damaged_and_foreign_files(file, name, damage, match):
    damage(file)
    with pytest.raises(ValueError, match=match) as e: Unusual.load(file)
    assert file.name in str(e.value) and str(file.parent) not in str(e.value)


# What ships

def test_the_shipped_classifier_and_its_card():
    file, card = WEIGHTS/'classifier.safetensors', read_json(WEIGHTS/'classifier.json')
    network, info = load_model(file)
    assert card['sha256'] == hashlib.sha256(file.read_bytes()).hexdigest() and card['bytes'] == file.stat().st_size < 4e6
    assert card['parameters'] == sum(p.numel() for p in network.parameters()) and card['threshold'] == info['threshold'] and card['classes'] == info['classes']
    assert info['trained_on'] == 'kermany' and card['licence'] == 'CC BY 4.0' and 'doi:10.17632/rscbjbr9sj.2' in card['data'] and 'Not a diagnostic device' in card['intended'] and 'children' in card['limits']
    assert all(card['scores'][f'test_{k}'] == v for k, v in info['test'].items())

def test_the_shipped_statistics_belong_to_it_and_are_small():
    network = load_model(WEIGHTS/'classifier.safetensors')[0]
    shipped = Unusual.load(network=network)
    assert shipped.info['network'] == weights_digest(network) and shipped.info['trained_on'] == 'kermany' and (WEIGHTS/'classifier.usual.safetensors').stat().st_size < 1e6
    assert shipped.info['mask_limits'] == read_json(WEIGHTS/'lungs.json')['limits']

def test_phantoms_are_strangers_to_the_shipped_classifier(phantom_root):
    from cxr_lab.phantom import make_phantom
    network = load_model(WEIGHTS/'classifier.safetensors')[0]
    pixels = standard_size(np.stack([make_phantom(5000 + i, i % 2).image for i in range(8)])[:, None])[:, None]
    assert sum('phantom' in r for r in reasons(Unusual.load(), network, pixels)) >= 7

def test_real_films(real_data, repo):
    "Some test films and what can be made of them."
    from cxr_lab.films import read_pixels
    network, usual = load_model(WEIGHTS/'classifier.safetensors')[0], Unusual.load()
    files = [f for c in ('NORMAL', 'PNEUMONIA') for f in sorted((real_data/'chest_xray'/'test'/c).iterdir())[::6]]
    pixels = np.stack([read_pixels(f.read_bytes(), 128) for f in files])
    assert len(files) > 100 and np.mean([bool(r) for r in reasons(usual, network, pixels)]) <= .05
    for change, least in ((lambda x: 255 - x, .95), (lambda x: np.rot90(x, 1, (2, 3)), .95), (lambda x: np.rot90(x, 2, (2, 3)), .95), (lambda x: x[..., ::-1], .8)):
        assert np.mean([r.startswith('seems') for r in reasons(usual, network, change(pixels))]) >= least
