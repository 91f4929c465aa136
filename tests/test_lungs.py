"Lungs: outlines, masks and their cache, files that cannot be trusted, tidying, plausibility, and that no image is lost."
import json, re, shutil, threading, zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from cxr_lab import lungs
from cxr_lab.films import square
from cxr_lab.images import Source
from cxr_lab.lungs import (
    SHIPPED, Segmenter, ahead, borrow_masks, deepest_features, draw_outlines, implausible,
    import_keras, load_masks, load_segmenter, lung_outlines, mask_cache, mask_shape, mask_shapes,
    pack, prepare, save_masks, save_unet, segment, shape_limits, surplus, tidy)
from cxr_lab.runs import MissingUpstream, Step, read_json
from cxr_lab.segment import build_unet, dice

def two_lungs(size=100):
    m = np.zeros((size, size), bool)
    m[size // 5:4 * size // 5, 15 * size // 100:42 * size // 100] = True
    m[size // 5:4 * size // 5, 58 * size // 100:85 * size // 100] = True
    return m

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
    assert set(found.split('+')) <= {*lungs.REASONS, ''}

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


# Files

@pytest.mark.parametrize('shipped', [True, False])
def test_older_versions_of_keras_know_every_setting_of_a_saved_network(shipped, tmp_path):
    path = SHIPPED if shipped else tmp_path/'n.keras'
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
    make(import_keras()).save(tmp_path/'n.keras')
    with pytest.raises(ValueError, match=match): load_segmenter(tmp_path/'n.keras')

def test_damage_is_noticed_with_and_without_a_card(tmp_path):
    saved = tmp_path/'saved.keras'
    save_unet(saved, build_unet(32, (4, 8)), {})
    for name, change, match in [('cut', lambda b: b[:len(b) // 2], 'cut off'), ('flipped', lambda b: b[:5000] + bytes([b[5000] ^ 255]) + b[5001:], 'damaged'), ('empty', lambda b: b'', 'cut off'), ('text', lambda b: b'hello', 'cut off')]:
        file = tmp_path/f'{name}.keras'
        file.write_bytes(change(saved.read_bytes()))
        if name == 'flipped': shutil.copy(saved.with_suffix('.json'), file.with_suffix('.json'))
        with pytest.raises(ValueError, match=match): load_segmenter(file)
    shutil.copy(saved, tmp_path/'other.keras'); (tmp_path/'other.json').write_text('{"sha256": "00"}')
    with pytest.raises(ValueError, match='other.json describes'): load_segmenter(tmp_path/'other.keras')
    with pytest.raises(FileNotFoundError, match='gone.keras'): load_segmenter(tmp_path/'gone.keras')

def test_the_shipped_network_is_what_its_card_says():
    if not SHIPPED.is_file(): pytest.skip('cxr_lab/weights/lungs.keras has not been made yet')
    segmenter = load_segmenter()
    card = segmenter.card
    assert SHIPPED.stat().st_size <= 4_000_000 == 4e6 and card['bytes'] == SHIPPED.stat().st_size and segmenter.size == 256
    assert 'CC BY 4.0' in card['licence'] and 'V7 Labs' in card['data'] and 'Kermany' in card['data']
    assert {'recipe', 'history', 'scores', 'limits', 'held_out', 'intended'} <= set(card) and card['scores']['n_held_out'] > 500
    assert import_keras().models.load_model(SHIPPED, safe_mode=True).count_params() == card['parameters'], 'by load_model alone'


# Many images

@pytest.mark.parametrize('workers', ['1', '3'])
def test_masks_of_many_images_are_those_of_one_batch_after_the_other(monkeypatch, workers):
    monkeypatch.setenv('CXR_LAB_CORES', workers)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 1, 64, 64), np.uint8)
    import_keras().utils.set_random_seed(0)  # an untrained network may find lungs everywhere
    segmenter, expected = Segmenter(build_unet(64, (4, 8))), []
    for i in range(0, 23, 4):
        expected.extend(segmenter(pixels[i:i + 4], 4) > .5)
    found = lungs.raw_masks(segmenter, pixels, 4)
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
    masks = lungs.raw_masks(Segmenter(Meets()), np.zeros((7 * 4, 1, 64, 64), np.uint8), 4)
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
    original = lungs.prepare
    assert not np.array_equal(masks(prepare=lambda p: 1 - original(p, 64)), first)
    with monkeypatch.context() as m:
        m.setattr(lungs, 'prepare', lambda p, size: 1 - original(p, size))
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


# Threads that run ahead, and what an outline has that a mask has not

def test_ahead_keeps_the_order_makes_little_in_advance_and_passes_errors_on():
    made = []
    def make(i):
        made.append(i)
        if i == 5: raise KeyError(i)
        return i * i
    found = ahead(make, iter(range(100)), 3)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(KeyError): next(found)
    assert max(made) <= 5 + 3, 'not more than the threads are ahead'

def test_surplus_of_outlines_that_are_larger_or_lower():
    mask = np.zeros((2, 100, 100), bool)
    mask[:, 20:60, 10:40] = mask[:, 20:60, 60:90] = True
    larger, lower = mask.copy(), np.roll(mask, 7, axis=1)
    larger[:, 20:60, 40:50] = True
    assert np.allclose(surplus(mask, mask), 0) and np.allclose(surplus(lower, mask), [[0, .07]] * 2)
    assert np.allclose(surplus(larger, mask), [[np.log(7 / 6), 0]] * 2)
    assert np.isfinite(surplus(mask & False, mask)).all()

def test_deepest_features_are_of_the_last_layer_at_the_coarsest_size_and_in_order():
    segmenter = Segmenter(build_unet(32, (4, 8, 6)))
    images = np.random.default_rng(0).integers(0, 256, (35, 1, 32, 32), np.uint8)
    found = deepest_features(segmenter, images)
    assert found.shape == (35, 4 * 8) and np.allclose(found[33:], deepest_features(segmenter, images[33:]), atol=1e-5)
