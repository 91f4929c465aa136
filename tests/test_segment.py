"Lung segmentation: outlines, agreement, training and its interruption, files that cannot be trusted, plausibility, and that no image is lost."
import json, re, shutil, subprocess, sys, threading, zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import dice as dice_distance, jaccard

import cxr_lab
from cxr_lab import segment as seg
from cxr_lab.data import Dataset, index_images, split_validation
from cxr_lab.films import square
from cxr_lab.images import Source, pixel_cache
from cxr_lab.kept import changed, code_of, only_since
from cxr_lab.runs import MissingUpstream, Step, read_json
from cxr_lab.segment import (Masks, Segmenter, agreement, agreement_scores, borrow_masks, build_unet, dice, draw_outlines, implausible, iou, load_masks, load_segmenter, lung_outlines,
                             mask_cache, mask_shape, mask_shapes, pack, prepare, save_masks, save_unet, segment, shape_limits, tidy, train_cached, train_unet, vary)

SHIPPED = Path(seg.__file__).parent/'weights'/'lungs.keras'
SMALL = dict(size=64, widths=(8, 16, 24), shown=1_000, batch_size=8, lr=4e-3, seed=0)

def two_lungs(size=100):
    m = np.zeros((size, size), bool)
    m[size // 5:4 * size // 5, 15 * size // 100:42 * size // 100] = m[size // 5:4 * size // 5, 58 * size // 100:85 * size // 100] = True
    return m

@pytest.fixture(scope='session')
def chests(phantom_root):
    "Index, 64-pixel images and outlines of the small phantoms."
    source = Source('phantom', phantom_root/'chest_xray', phantom_root/'lung_masks')
    index = split_validation(index_images(source.images)[0], .2)
    data = Dataset(index, pixel_cache(source.images, index, 64), source)
    return data, *lung_outlines(source, index, 64)

@pytest.fixture(scope='session')
def trained(chests):
    "File of a network trained for seconds."
    data, outlines, have = chests
    return train_cached(data, data.pixels, outlines, have, SMALL)

class Fake:
    "In place of a network: 'lung' is what is brighter than the image's middle gray."
    input_shape = (None, 64, 64, 1)
    def predict_on_batch(self, x): return (x > .5).astype(np.float32)


# Masks and outlines

@pytest.mark.parametrize('size', [8, 20, 33, 128])
def test_packed_masks_are_what_was_packed(size):
    m = np.random.default_rng(size).random((5, size, size)) > .5
    packed = pack(iter(m))
    assert len(packed) == 5 and packed.size == size and packed.packed.nbytes <= 5 * size * (size / 8 + 1)
    for rows in (2, slice(None), [4, 0], np.array([1, 1])): assert np.array_equal(packed[rows], m[rows]) and packed[rows].dtype == bool

@pytest.mark.parametrize('masks', [[], [np.zeros((4, 5), bool)], [np.zeros((4, 4), bool), np.zeros((5, 5), bool)]])
def test_only_squares_of_one_size_are_packed(masks):
    with pytest.raises(ValueError, match='squares of one size'): pack(masks)

@pytest.mark.parametrize('aspect', ['stretch', 'pad', 'crop'])
def test_outlines_follow_their_image_through_every_aspect(tmp_path, aspect):
    "The image is its own outline, one of them stored at another size than the image."
    rng, rows = np.random.default_rng(0), []
    for i, (w, h) in enumerate([(90, 60), (50, 80), (64, 64)]):
        lung = np.zeros((h, w), np.uint8)
        lung[h // 5:h // 2, w // 4:w // 2] = 255
        path = f'train/NORMAL/IM-000{i}-0001.jpeg'
        for root, suffix in (('images', '.png'), ('lung_masks', '.png')): (tmp_path/root/path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(lung).resize((2 * w, 2 * h) if i == 0 else (w, h)).convert('1').save((tmp_path/'lung_masks'/path).with_suffix('.png'))
        rows.append((path, w, h, square(Image.fromarray(lung), 48, aspect)[0] > 127))
    rows.insert(1, ('train/NORMAL/IM-0009-0001.jpeg', 60, 60, np.zeros((48, 48), bool)))
    index = pd.DataFrame([r[:3] for r in rows], columns=['path', 'width', 'height'])
    masks, have = lung_outlines(Source('folder', tmp_path/'images', tmp_path/'lung_masks'), index, 48, aspect)
    assert have.tolist() == [True, False, True, True] and len(masks) == 4
    assert all(dice(masks[i], r[3]) > .97 for i, r in enumerate(rows)) and not masks[1].any()

def test_a_data_set_without_outlines_has_none(chests):
    masks, have = lung_outlines(Source('folder', Path('x')), chests[0].index, 40)
    assert not have.any() and len(masks) == len(have) == len(chests[0].index) and not masks[:].any()

def test_a_damaged_outline_is_named(tmp_path):
    (tmp_path/'train/NORMAL').mkdir(parents=True)
    (tmp_path/'train/NORMAL/IM-0001-0001.png').write_bytes(b'no image')
    index = pd.DataFrame(dict(path=['train/NORMAL/IM-0001-0001.jpeg'], width=9, height=9))
    with pytest.raises(ValueError, match='IM-0001-0001.png'): lung_outlines(Source('folder', tmp_path, tmp_path), index, 16)

def test_outlines_are_drawn_in_their_colors():
    out = draw_outlines(np.zeros((1, 50, 50), np.uint8), human=two_lungs(50), network=~two_lungs(50) & False)
    assert out.shape == (100, 100, 3) and tuple(out.max((0, 1))) == (0x56, 0xB4, 0xE9)


# Preparation and variation

def test_exposure_leaves_no_trace_in_what_the_network_sees():
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (80, 80), np.uint8), (0, 0), 4)
    image = cv2.normalize(image, None, 40, 200, cv2.NORM_MINMAX)[None, None]
    x = [prepare(i, 64) for i in (image, image // 2, 255 - (255 - image) // 2)]
    assert x[0].shape == (1, 64, 64, 1) and x[0].dtype == np.float32
    assert all(np.abs(x[0] - other).mean() < .02 for other in x[1:])
    assert -.5 <= x[0].min() and x[0].max() <= 1.5

@pytest.mark.parametrize('value', [0, 7, 255])
def test_a_blank_image_is_prepared_without_noise_or_nan(value): assert not prepare(np.full((2, 1, 50, 50), value, np.uint8), 32).any()

@pytest.mark.parametrize('bad', [np.zeros((2, 1, 8, 8)), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)])
def test_wrong_pixels_are_refused(bad):
    with pytest.raises(ValueError, match='uint8'): prepare(bad, 8)

def test_variation_depends_on_its_seed_only_and_on_its_strength():
    rng = np.random.default_rng(0)
    image, lungs = cv2.GaussianBlur(rng.integers(0, 256, (96, 96), np.uint8), (0, 0), 5), two_lungs(96)
    for s in range(8):
        a, b = vary(image, lungs, np.random.default_rng(s)), vary(image, lungs, np.random.default_rng(s))
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[0].dtype == np.uint8 and a[1].dtype == bool
    def change(k): return np.mean([np.abs(vary(image, lungs, np.random.default_rng(s), k)[0].astype(int) - image).mean() for s in range(30)])
    assert change(0) < 1.5 < change(.25) < change(1)
    assert all(np.array_equal(vary(image, lungs, np.random.default_rng(s), 0)[1], lungs) for s in range(10))

def test_batches_do_not_depend_on_the_number_of_threads_and_change_with_the_epoch(chests):
    data, outlines, have = chests
    rows = np.flatnonzero(have)[:19]
    one, four, next_epoch = (list(seg.batches(data.pixels, outlines, rows, 4, 0, epoch, workers=w)) for w, epoch in ((1, 0), (4, 0), (1, 1)))
    assert len(one) == 4 and all(x.shape == y.shape == (4, 64, 64, 1) for x, y in one)
    assert all(np.array_equal(a, b) for p, q in zip(one, four) for a, b in zip(p, q)) and not np.array_equal(one[0][0], next_epoch[0][0])


# Agreement

def test_dice_and_iou_against_scipy():
    rng = np.random.default_rng(0)
    a, b = (rng.random((40, 17, 17)) < rng.random((40, 1, 1)) for _ in range(2))
    assert np.allclose(dice(a, b), [1 - dice_distance(x.ravel(), y.ravel()) for x, y in zip(a, b)])
    assert np.allclose(iou(a, b), [1 - jaccard(x.ravel(), y.ravel()) for x, y in zip(a, b)])

def test_dice_of_empty_masks_and_of_things_that_are_not_masks():
    empty, full = np.zeros((3, 4, 4), bool), np.ones((3, 4, 4), bool)
    assert (dice(empty, empty) == 1).all() and (iou(empty, empty) == 1).all() and (dice(empty, full) == 0).all() and (iou(full, full) == 1).all()
    for bad in (full[:2], full.astype(np.uint8), full * .5):
        with pytest.raises(ValueError, match='same shape, bool'): dice(full, bad)

def test_scores_by_class():
    index = pd.DataFrame(dict(path=list('abcd'), label=[0, 0, 1, 1]))
    lungs, half = two_lungs(), two_lungs() & (np.arange(100) < 50)
    table = agreement(index, np.array([1, 2, 3]), pack([lungs, half, lungs]), pack([half] + [lungs] * 3))
    assert table.path.tolist() == ['b', 'c', 'd'] and np.allclose(table.dice, [1, 2 / 3, 1]) and np.allclose(table.iou, [1, .5, 1])
    scores = agreement_scores(table)
    assert scores['n_held_out'] == 3 and scores['dice_NORMAL'] == 1 and abs(scores['dice_PNEUMONIA'] - 5 / 6) < 1e-9
    assert agreement_scores(table[table.label == 1])['dice_NORMAL'] is None and agreement_scores(table[:0]) == {'n_held_out': 0}


# Tidying

def tidied_by_scipy(mask, least=.02):
    parts, n = ndimage.label(mask)
    areas = sorted(((np.count_nonzero(parts == i), -i) for i in range(1, n + 1)), reverse=True)[:2]
    kept = np.isin(parts, [-i for area, i in areas if area >= least * mask.size])
    return ndimage.binary_fill_holes(kept, np.ones((3, 3)))  # lungs: sides touch; background: corners too

@pytest.mark.parametrize('seed', range(12))
def test_tidying_against_scipy(seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(90, 90)), 3 + seed % 4)
    mask = noise > np.quantile(noise, .4 + .04 * (seed % 8))
    ours, theirs = tidy(mask), tidied_by_scipy(mask)
    assert np.array_equal(ours, theirs)
    assert ndimage.label(ours)[1] <= 2 and np.array_equal(tidy(ours), ours)

def test_what_tidying_keeps():
    lungs = two_lungs()
    speck = lungs.copy(); speck[2:6, 2:6] = True
    hole = lungs.copy(); hole[40:50, 20:30] = False
    notch = lungs.copy(); notch[60:, 20:30] = False
    border = np.zeros((100, 100), bool); border[:, :30] = border[:, 70:] = True
    assert np.array_equal(tidy(speck), lungs) and np.array_equal(tidy(hole), lungs) and np.array_equal(tidy(notch), notch)
    assert np.array_equal(tidy(border), border), 'between lungs that touch the border is no hole'
    assert not tidy(np.zeros((50, 50), bool)).any() and tidy(np.ones((50, 50), bool)).all()
    assert np.array_equal(speck[2:6, 2:6], np.ones((4, 4), bool)), 'its input is left as it was'


# Plausibility

LIMITS = dict(area=[.1, .6], aspect=[.7, 1.8], balance=[.4, 1.])

def joined(m): m = m.copy(); m[60:70, 42:58] = True; return m
def scaled(f): return cv2.resize(two_lungs().astype(np.uint8), None, fx=f, fy=f)[:100, :100].astype(bool)
def small(f): m = np.zeros((100, 100), bool); s = scaled(f); m[:len(s), :len(s)] = s; return m

@pytest.mark.parametrize('name,mask,expected', [
    ('two lungs', two_lungs(), ''), ('joined', joined(two_lungs()), ''), ('right only', two_lungs() & (np.arange(100) < 50), 'one lung'), ('left only', two_lungs() & (np.arange(100) >= 50), 'one lung'),
    ('a remnant', two_lungs() & ((np.arange(100) < 50) | (np.arange(100)[:, None] < 26)), 'one lung'), ('empty', two_lungs() & False, 'empty'), ('everything', two_lungs() | True, 'area'),
    ('tiny', small(.3), 'area'), ('flat', two_lungs() & (np.arange(100)[:, None] < 40), 'aspect'), ('one pixel', np.arange(10000).reshape(100, 100) == 5050, 'one lung'),
], ids=lambda v: v if isinstance(v, str) else '')
def test_reasons(name, mask, expected):
    found = implausible(mask_shape(mask), LIMITS)
    assert expected in found.split('+') if expected else found == ''
    assert set(found.split('+')) <= {*seg.REASONS, ''}

def test_limits_bear_some_wrong_outlines_and_contain_the_usual_ones():
    rng = np.random.default_rng(0)
    shapes = pd.DataFrame(dict(area=rng.normal(.33, .03, 2000), aspect=rng.normal(1.1, .1, 2000), balance=rng.uniform(.8, 1, 2000)))
    shapes.loc[:2, 'area'], shapes.loc[:2, 'aspect'] = .99, 9.
    limits = shape_limits(shapes)
    assert .15 < limits['area'][0] < .25 and .4 < limits['area'][1] < .6 and limits['aspect'][1] < 2.2 and limits['balance'][1] == 1
    json.dumps(limits)

def test_shapes_of_many_keep_their_types():
    shapes = mask_shapes(pack([two_lungs(), two_lungs() & False]))
    assert shapes.parts.tolist() == [2, 0] and np.isnan(shapes.aspect[1]) and shapes.area[1] == 0


# No image is lost

def odd_images():
    rng = np.random.default_rng(0)
    chest = np.where(two_lungs(64), 40, 200).astype(np.uint8)
    return np.stack([chest, np.zeros_like(chest), np.full_like(chest, 255), rng.integers(0, 256, chest.shape, np.uint8), chest, 255 - chest])[:, None]

def test_as_many_masks_as_images_whatever_the_images():
    pixels = odd_images()
    for batch_size in (1, 4, 32):
        masks = segment(Segmenter(Fake()), pixels, batch_size)
        assert len(masks) == len(pixels) and masks[1].sum() == 0
    reasons = np.array([implausible(s, LIMITS) for s in mask_shapes(masks).to_dict('records')])
    final, rule, lender = borrow_masks(masks, reasons, pixels, np.ones(len(pixels), bool))
    assert len(final) == len(pixels) and final[:].any((1, 2)).all()
    assert ((rule == 'own') == (reasons == '')).all() and ((lender >= 0) == (rule == 'nearest')).all()

def test_the_nearest_plausible_training_image_lends_its_mask():
    rng = np.random.default_rng(0)
    kinds = [cv2.GaussianBlur(rng.integers(0, 256, (64, 64), np.uint8), (0, 0), 6) for _ in range(3)]
    kinds = [cv2.normalize(k, None, 0, 220, cv2.NORM_MINMAX) for k in kinds]
    pixels = np.stack([(kinds[i % 3] + rng.integers(0, 12, (64, 64))).astype(np.uint8) for i in range(30)])[:, None]
    masks = np.zeros((30, 64, 64), bool)
    for i in range(30): masks[i, :, :20 + 10 * (i % 3)] = True
    reasons, lenders = np.full(30, '', object), np.arange(30) < 24
    for bad in (7, 26): masks[bad], reasons[bad] = False, 'empty'
    final, rule, lender = borrow_masks(pack(masks), reasons.astype(str), pixels, lenders)
    assert rule[7] == rule[26] == 'nearest' and lender[7] % 3 == 1 and lender[26] % 3 == 2 and lenders[lender[26]]
    assert np.array_equal(final[7], masks[1]) and np.array_equal(final[26], masks[2]) and all(np.array_equal(final[i], masks[i]) for i in range(30) if i not in (7, 26))

@pytest.mark.parametrize('lenders', [np.zeros(6, bool), np.arange(6) == 0])
def test_without_lenders_the_image_stays_whole(lenders):
    reasons = np.array(['', 'empty', 'area', 'empty', '', 'one lung'])
    final, rule, lender = borrow_masks(pack([two_lungs(64)] * 6), reasons, odd_images(), lenders)
    assert rule.tolist() == ['own', 'whole', 'whole', 'whole', 'own', 'whole'] and final[[1, 2, 3, 5]].all() and (lender == -1).all()


# Training

def test_a_network_trained_for_seconds_finds_the_lungs_of_unseen_phantoms(chests, trained):
    data, outlines, _ = chests
    rows = data.rows('test')
    segmenter = load_segmenter(trained)
    scores = agreement_scores(agreement(data.index, rows, segment(segmenter, data.pixels[rows]), outlines))
    assert scores['dice_mean'] > .85 and scores['n_held_out'] == len(rows), scores
    card = segmenter.card
    assert len(card['history']) == round(1_000 / len(data.rows('train'))) and card['history'][-1]['loss'] < card['history'][0]['loss']
    assert set(card['held_out']) == set(data.index.patient[data.rows('validation')]) and not set(card['held_out']) & set(data.index.patient[data.rows('train')])
    assert card['trained_on'] == 'phantoms' and not list(trained.parent.glob('*.tmp*'))

def test_a_finished_training_is_not_repeated(chests, trained, capsys):
    data, outlines, have = chests
    before = trained.stat().st_mtime_ns
    assert train_cached(data, data.pixels, outlines, have, SMALL) == trained and trained.stat().st_mtime_ns == before
    assert re.fullmatch(r'lung network kept from .*: same images, parameters and code\n', capsys.readouterr().out)
    assert {'train_unet', 'vary', 'batches', 'outline_loss', 'dice', 'build_unet'} <= set(read_json(trained.parent/'recipe.json')['code'])

@pytest.mark.parametrize('name', ['train_unet', 'vary', 'outline_loss', 'build_unet', '_pass'])
def test_an_edited_definition_of_the_training_is_trained_again(chests, trained, monkeypatch, name):
    data, outlines, have = chests
    original = getattr(seg, name)
    def edited(*args, **kwargs): return original(*args, **kwargs)
    class Trained(Exception): pass
    def stop(*args, **kwargs): raise Trained
    monkeypatch.setattr(seg, name, edited)
    assert changed(code_of(original), code_of(edited))
    monkeypatch.setattr('keras.utils.set_random_seed', stop)  # where a training begins
    with pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, SMALL)

def test_a_fresh_training_is_a_new_one(chests, monkeypatch):
    data, outlines, have = chests
    class Trained(Exception): pass
    def stop(*args, **kwargs): raise Trained
    quick = SMALL | dict(shown=1)
    made = train_cached(data, data.pixels, outlines, have, quick).with_suffix('.json').stat().st_mtime
    monkeypatch.setattr('keras.utils.set_random_seed', stop)
    with only_since(made - 1): train_cached(data, data.pixels, outlines, have, quick)
    with only_since(made + 1), pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, quick)
    monkeypatch.undo()
    train_cached(data, data.pixels, outlines, have, quick)
    monkeypatch.setattr('keras.utils.set_random_seed', stop)
    with pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, quick, fresh=True)


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(chests, tmp_path, monkeypatch):
    data, outlines, have = chests
    fit, check = (np.flatnonzero(have & (data.index.split == s))[:24] for s in ('train', 'validation'))
    recipe = SMALL | dict(shown=3 * len(fit), widths=(4, 8))
    reference, history = train_unet(tmp_path/'a', data.pixels, outlines, fit, check, recipe)
    real, stop = seg.batches, {1, 2}
    def interrupted(*args, **kwargs):
        for i, batch in enumerate(real(*args, **kwargs)):
            if i == 2 and args[5] in stop: stop.remove(args[5]); raise KeyboardInterrupt
            yield batch
    monkeypatch.setattr(seg, 'batches', interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): train_unet(tmp_path/'b', data.pixels, outlines, fit, check, recipe)
        assert len(list((tmp_path/'b').iterdir())) == 1, 'one checkpoint, nothing half written'
    resumed, again = train_unet(tmp_path/'b', data.pixels, outlines, fit, check, recipe)
    assert len(again) == len(history) == 3
    assert np.allclose(again.loss, history.loss, atol=1e-3) and np.allclose(again.dice, history.dice, atol=5e-3)
    assert all(np.allclose(a, b, atol=5e-3) for a, b in zip(resumed.get_weights(), reference.get_weights()))

def test_nothing_to_train_on_is_said(chests):
    data, outlines, have = chests
    with pytest.raises(ValueError, match='no lung outlines'): train_cached(data, data.pixels, outlines, have & False, SMALL)
    with pytest.raises(ValueError, match='batch_size=9999'): train_cached(data, data.pixels, outlines, have, SMALL | dict(batch_size=9999))


# Files

@pytest.mark.parametrize('shipped', [True, False])
def test_older_versions_of_keras_know_every_setting_of_a_saved_network(shipped, tmp_path):
    path = Path(cxr_lab.__file__).parent/'weights'/'lungs.keras' if shipped else tmp_path/'n.keras'
    if not shipped: save_unet(path, build_unet(32, (4, 8)), {})
    with zipfile.ZipFile(path) as archive: layers = json.loads(archive.read('config.json'))['config']['layers']
    def settings(config):
        if isinstance(config, list): return set().union(*map(settings, config))
        return set(config).union(*map(settings, config.values())) if isinstance(config, dict) else set()
    found = settings(layers)
    assert {'kernel_initializer', 'momentum', 'seed'} <= found, 'this is not where the settings stand'
    newer = {'input_axes', 'output_axes', 'renorm', 'renorm_clipping', 'renorm_momentum'}  # than Keras 3.10
    assert not found & newer

def test_a_saved_network_answers_as_before_and_says_what_it_is(tmp_path):
    network = build_unet(32, (4, 8))
    card = save_unet(tmp_path/'n.keras', network, dict(title='x'))
    assert card == read_json(tmp_path/'n.json') and card['parameters'] == network.count_params() and card['bytes'] == (tmp_path/'n.keras').stat().st_size
    loaded, pixels = load_segmenter(tmp_path/'n.keras'), np.random.default_rng(0).integers(0, 256, (5, 1, 40, 40), np.uint8)
    assert np.allclose(loaded(pixels), Segmenter(network)(pixels), atol=1e-6) and loaded.size == 32 and loaded.digest == card['sha256']
    assert np.allclose(loaded(pixels[:2], 4), loaded(pixels)[:2], atol=1e-5), 'other images of a batch do not matter'

def lambda_model(keras): return keras.Sequential([keras.layers.Input((32, 32, 1)), keras.layers.Lambda(lambda x: x * 2)])
def classifier(keras): return keras.Sequential([keras.layers.Input((32, 32, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])

@pytest.mark.parametrize('make,match', [(lambda_model, 'without running code'), (classifier, r'maps \(None, 32, 32, 1\)')])
def test_other_models_are_refused(tmp_path, make, match):
    make(seg._keras()).save(tmp_path/'n.keras')
    with pytest.raises(ValueError, match=match): load_segmenter(tmp_path/'n.keras')

def test_damage_is_noticed_with_and_without_a_card(trained, tmp_path):
    for name, change, match in [('cut', lambda b: b[:len(b) // 2], 'cut off'), ('flipped', lambda b: b[:5000] + bytes([b[5000] ^ 255]) + b[5001:], 'damaged'), ('empty', lambda b: b'', 'cut off'), ('text', lambda b: b'hello', 'cut off')]:
        file = tmp_path/f'{name}.keras'
        file.write_bytes(change(trained.read_bytes()))
        if name == 'flipped': shutil.copy(trained.with_suffix('.json'), file.with_suffix('.json'))
        with pytest.raises(ValueError, match=match): load_segmenter(file)
    shutil.copy(trained, tmp_path/'other.keras'); (tmp_path/'other.json').write_text('{"sha256": "00"}')
    with pytest.raises(ValueError, match='other.json describes'): load_segmenter(tmp_path/'other.keras')
    with pytest.raises(FileNotFoundError, match='gone.keras'): load_segmenter(tmp_path/'gone.keras')

def test_the_shipped_network_is_what_its_card_says():
    if not SHIPPED.is_file(): pytest.skip('cxr_lab/weights/lungs.keras has not been made yet')
    segmenter = load_segmenter()
    card = segmenter.card
    assert SHIPPED.stat().st_size <= 4_000_000 == 4e6 and card['bytes'] == SHIPPED.stat().st_size and segmenter.size == 256
    assert 'CC BY 4.0' in card['licence'] and 'V7 Labs' in card['data'] and 'Kermany' in card['data']
    assert {'recipe', 'history', 'scores', 'limits', 'held_out', 'intended'} <= set(card) and card['scores']['n_held_out'] > 500
    assert seg._keras().models.load_model(SHIPPED, safe_mode=True).count_params() == card['parameters'], 'by load_model alone'

def test_the_shipped_network_on_real_children_it_was_not_trained_on(real_data):
    if not SHIPPED.is_file(): pytest.skip('cxr_lab/weights/lungs.keras has not been made yet')
    if not (real_data/'lung_masks').is_dir(): pytest.skip('no human outlines here')
    segmenter, files = load_segmenter(), sorted((real_data/'chest_xray'/'train').rglob('*.jpeg'))
    from cxr_lab.data import patient_of
    from cxr_lab.films import read_pixels
    held_out = [f for f in files if patient_of(f.name) in set(segmenter.card['held_out'])][::16]
    index = pd.DataFrame(dict(path=[f.relative_to(real_data/'chest_xray').as_posix() for f in held_out], width=224, height=224, label=[int('PNEUMONIA' in str(f)) for f in held_out]))
    outlines, have = lung_outlines(Source('kermany', real_data/'chest_xray', real_data/'lung_masks'), index, 256)
    pixels = np.stack([read_pixels(f.read_bytes(), 256) for f in held_out])
    scores = agreement_scores(agreement(index, np.flatnonzero(have), segment(segmenter, pixels[have]), outlines))
    assert scores['n_held_out'] > 20 and abs(scores['dice_mean'] - segmenter.card['scores']['dice_mean']) < .015, scores

def test_tensorflow_comes_late_and_silently_and_before_or_after_torchvision():
    code = """
import sys
from cxr_lab import segment
assert not {'tensorflow', 'keras'} & set(sys.modules)
import numpy as np
network = segment.build_unet(32, (4, 8))
assert segment.Segmenter(network)(np.zeros((2, 1, 32, 32), np.uint8)).shape == (2, 32, 32)
import torchvision, cxr_lab.train
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '' and done.stdout == '', done.stderr[-500:]


# Many images

@pytest.mark.parametrize('workers', ['1', '3'])
def test_masks_of_many_images_are_those_of_one_batch_after_the_other(monkeypatch, workers):
    monkeypatch.setenv('CXR_LAB_CORES', workers)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 1, 64, 64), np.uint8)
    segmenter, expected = Segmenter(build_unet(64, (4, 8))), []
    for i in range(0, 23, 4):
        expected.extend(segmenter(pixels[i:i + 4], 4) > .5)
    found = seg.raw_masks(segmenter, pixels, 4)
    assert len(found) == 23 and np.array_equal(found[:], expected) and 0 < np.mean(expected) < 1

def test_every_core_segments_a_batch_of_its_own(monkeypatch):
    monkeypatch.setenv('CXR_LAB_CORES', '3')
    together = threading.Barrier(3, timeout=60)
    class Meets(Fake):
        "All batches but the first, which compiles, wait until three are under way."
        alone = True
        def predict_on_batch(self, x):
            if self.alone: self.alone = False
            else: together.wait()
            return super().predict_on_batch(x)
    masks = seg.raw_masks(Segmenter(Meets()), np.zeros((7 * 4, 1, 64, 64), np.uint8), 4)
    assert len(masks) == 28


# The cache of masks

def test_masks_are_computed_once_and_again_when_damaged(chests, tmp_path, capsys):
    data, pixels = chests[0], chests[0].pixels
    calls = []
    class Counting(Fake):
        def predict_on_batch(self, x): calls.append(len(x)); return super().predict_on_batch(x)
    segmenter = Segmenter(Counting(), 'a')
    first, seconds = mask_cache(segmenter, pixels, data.index, folder=tmp_path)
    n = len(calls)
    again, same = mask_cache(segmenter, pixels, data.index, folder=tmp_path)
    assert len(calls) == n and same == seconds and np.array_equal(first.packed, again.packed) and len(again) == len(data.index)
    file = next(tmp_path.glob('*/masks.npy'))
    for damage in (lambda b: b[:-100], lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:], lambda b: b''):
        file.write_bytes(damage(file.read_bytes()))
        assert np.array_equal(mask_cache(segmenter, pixels, data.index, folder=tmp_path)[0].packed, first.packed)
        assert 'damaged' in capsys.readouterr().out
    n = len(calls)
    assert mask_cache(segmenter, pixels, data.index, folder=tmp_path)[0] and len(calls) == n
    assert re.fullmatch(r'masks kept from .*: same images, parameters and code\n', capsys.readouterr().out)
    mask_cache(segmenter, pixels, data.index, folder=tmp_path, fresh=True)
    assert len(calls) == n + n // 4 and 'damaged' not in capsys.readouterr().out
    n = len(calls)
    mask_cache(Segmenter(Counting(), 'b'), pixels, data.index, folder=tmp_path)
    assert len(calls) > n and len(list(tmp_path.glob('*/masks.npy'))) == 2, 'another network has masks of its own'
    with pytest.raises(ValueError, match='images for'): mask_cache(segmenter, pixels[:5], data.index, folder=tmp_path)

def test_masks_are_those_of_the_code_and_the_pixels(chests, tmp_path, monkeypatch):
    data, pixels = chests[0], np.array(chests[0].pixels)
    def masks(p=pixels, **how): return mask_cache(Segmenter(Fake(), 'a', **how), p, data.index, folder=tmp_path)[0][:]
    first = masks()
    assert not np.array_equal(masks(255 - pixels), first)
    original = seg.prepare
    assert not np.array_equal(masks(prepare=lambda p: 1 - original(p, 64)), first)
    with monkeypatch.context() as m:
        m.setattr(seg, 'prepare', lambda p, size: 1 - original(p, size))
        assert not np.array_equal(masks(), first)
    assert np.array_equal(masks(), first) and len(list(tmp_path.glob('*/masks.npy'))) == 4

def test_an_interrupted_segmentation_leaves_nothing_behind(chests, tmp_path):
    class Stops(Fake):
        def predict_on_batch(self, x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): mask_cache(Segmenter(Stops(), 'a'), chests[0].pixels, chests[0].index, folder=tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == ['.lock']


# What later lessons read

@pytest.fixture
def run(chests, tmp_path):
    "A run with an index and masks; mask i is i + 1 columns wide."
    index = chests[0].index[:20]
    step = Step(tmp_path/'run', '00_data', dict(image_size=32))
    step.write_csv(index, 'index.csv')
    step = Step(tmp_path/'run', '07_segment', {})
    masks = np.zeros((20, 64, 64), bool)
    for i in range(20): masks[i, :, :2 * (i + 1)] = True
    save_masks(step, pack(masks), index)
    return step, masks, index

def test_mask_i_belongs_to_row_i(run):
    step, masks, _ = run
    small, same, large = load_masks(step), load_masks(step, 64), load_masks(step, 128)
    assert small.shape == (20, 1, 32, 32) and small.dtype == bool and np.array_equal(same[:, 0], masks)
    assert small.sum((1, 2, 3)).tolist() == [32 * (i + 1) for i in range(20)] and np.abs(large.sum((1, 2, 3)) / 4 - masks.sum((1, 2))).max() < 128

def test_masks_of_other_images_damaged_or_missing_masks_are_refused(run):
    step, _, index = run
    Step(step.run, '00_data', dict(image_size=32)).write_csv(index[::-1], 'index.csv')
    with pytest.raises(ValueError, match='other images'): load_masks(step)
    Step(step.run, '00_data', dict(image_size=32)).write_csv(index, 'index.csv')
    file = step.path('masks.npz')
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match='damaged.*run 07_segment again'): load_masks(step)
    file.unlink()
    with pytest.raises(MissingUpstream, match='run notebook 07_segment first'): load_masks(step)
