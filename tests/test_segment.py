"Lung segmentation: variation, agreement, a training and its interruption."
import re, subprocess, sys

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import dice as dice_distance, jaccard
from test_lungs import two_lungs

from cxr_lab import lungs, segment as seg
from cxr_lab.images import Source
from cxr_lab.kept import changed, code_of, only_since
from cxr_lab.lungs import (
    SHIPPED, UnetParts, load_segmenter, lung_outlines, pack, segment, train_cached, train_unet)
from cxr_lab.runs import read_json
from cxr_lab.segment import dice, iou, outline_overlap, overlap_scores, vary

SMALL = dict(size=64, widths=(8, 16, 24), shown=1_000, batch_size=8, lr=4e-3, seed=0)

def parts(): return UnetParts(seg.start_unet, seg.one_pass, seg.watch)

@pytest.fixture(scope='session')
def trained(chests):
    "File of a network trained for seconds."
    data, outlines, have = chests
    return train_cached(data, data.pixels, outlines, have, SMALL, parts())


# Preparation and variation

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
    table = outline_overlap(index, np.array([1, 2, 3]), pack([lungs, half, lungs]), pack([half] + [lungs] * 3))
    assert table.path.tolist() == ['b', 'c', 'd'] and np.allclose(table.dice, [1, 2 / 3, 1]) and np.allclose(table.iou, [1, .5, 1])
    scores = overlap_scores(table)
    assert scores['n_held_out'] == 3 and scores['dice_NORMAL'] == 1 and abs(scores['dice_PNEUMONIA'] - 5 / 6) < 1e-9
    assert overlap_scores(table[table.label == 1])['dice_NORMAL'] is None and overlap_scores(table[:0]) == {'n_held_out': 0}


# Training

def test_a_network_trained_for_seconds_finds_the_lungs_of_unseen_phantoms(chests, trained):
    data, outlines, _ = chests
    rows = data.rows('test')
    segmenter = load_segmenter(trained)
    scores = overlap_scores(outline_overlap(data.index, rows, segment(segmenter, data.pixels[rows]), outlines))
    assert scores['dice_mean'] > .85 and scores['n_held_out'] == len(rows), scores
    card = segmenter.card
    assert len(card['history']) == round(1_000 / len(data.rows('train'))) and card['history'][-1]['loss'] < card['history'][0]['loss']
    assert set(card['held_out']) == set(data.index.patient[data.rows('validation')]) and not set(card['held_out']) & set(data.index.patient[data.rows('train')])
    assert card['trained_on'] == 'phantoms' and not list(trained.parent.glob('*.tmp*'))

def test_a_finished_training_is_not_repeated(chests, trained, capsys):
    data, outlines, have = chests
    before = trained.stat().st_mtime_ns
    assert train_cached(data, data.pixels, outlines, have, SMALL, parts()) == trained and trained.stat().st_mtime_ns == before
    assert re.fullmatch(r'lung network kept from .*: same images, parameters and code\n', capsys.readouterr().out)
    assert {'train_unet', 'vary', 'batches', 'outline_loss', 'dice', 'build_unet', 'start_unet', 'one_pass', 'watch', 'prepare'} <= set(read_json(trained.parent/'recipe.json')['code'])

@pytest.mark.parametrize('name', ['train_unet', 'vary', 'outline_loss', 'build_unet', 'start_unet', 'one_pass', 'watch', 'prepare'])
def test_an_edited_definition_of_the_training_is_trained_again(chests, trained, monkeypatch, name):
    data, outlines, have = chests
    module = lungs if name == 'train_unet' else seg
    original = getattr(module, name)
    def edited(*args, **kwargs): return original(*args, **kwargs)
    class Trained(Exception): pass
    def stop(*args, **kwargs): raise Trained
    monkeypatch.setattr(module, name, edited)
    assert changed(code_of(original), code_of(edited))
    monkeypatch.setattr('keras.utils.set_random_seed', stop)  # where a training begins
    with pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, SMALL, parts())

def test_a_fresh_training_is_a_new_one(chests, monkeypatch):
    data, outlines, have = chests
    class Trained(Exception): pass
    def stop(*args, **kwargs): raise Trained
    quick = SMALL | dict(shown=1)
    made = train_cached(data, data.pixels, outlines, have, quick, parts()).with_suffix('.json').stat().st_mtime
    monkeypatch.setattr('keras.utils.set_random_seed', stop)
    with only_since(made - 1): train_cached(data, data.pixels, outlines, have, quick, parts())
    with only_since(made + 1), pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, quick, parts())
    monkeypatch.undo()
    train_cached(data, data.pixels, outlines, have, quick, parts())
    monkeypatch.setattr('keras.utils.set_random_seed', stop)
    with pytest.raises(Trained): train_cached(data, data.pixels, outlines, have, quick, parts(), fresh=True)

def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(chests, tmp_path, monkeypatch):
    data, outlines, have = chests
    fit, check = (np.flatnonzero(have & (data.index.split == s))[:24] for s in ('train', 'validation'))
    recipe = SMALL | dict(shown=3 * len(fit), widths=(4, 8))
    reference, history = train_unet(tmp_path/'a', data.pixels, outlines, fit, check, recipe, parts())
    real, stop = seg.batches, {1, 2}
    def interrupted(*args, **kwargs):
        for i, batch in enumerate(real(*args, **kwargs)):
            if i == 2 and args[5] in stop: stop.remove(args[5]); raise KeyboardInterrupt
            yield batch
    monkeypatch.setattr(seg, 'batches', interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): train_unet(tmp_path/'b', data.pixels, outlines, fit, check, recipe, parts())
        assert len(list((tmp_path/'b').iterdir())) == 1, 'one checkpoint, nothing half written'
    resumed, again = train_unet(tmp_path/'b', data.pixels, outlines, fit, check, recipe, parts())
    assert len(again) == len(history) == 3
    assert np.allclose(again.loss, history.loss, atol=1e-3) and np.allclose(again.dice, history.dice, atol=5e-3)
    assert all(np.allclose(a, b, atol=5e-3) for a, b in zip(resumed.get_weights(), reference.get_weights()))

def test_nothing_to_train_on_is_said(chests):
    data, outlines, have = chests
    with pytest.raises(ValueError, match='no lung outlines'): train_cached(data, data.pixels, outlines, have & False, SMALL, parts())
    with pytest.raises(ValueError, match='batch_size=9999'): train_cached(data, data.pixels, outlines, have, SMALL | dict(batch_size=9999), parts())


# Files

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
    scores = overlap_scores(outline_overlap(index, np.flatnonzero(have), segment(segmenter, pixels[have]), outlines))
    assert scores['n_held_out'] > 20 and abs(scores['dice_mean'] - segmenter.card['scores']['dice_mean']) < .015, scores

def test_tensorflow_comes_late_and_silently_and_before_or_after_torchvision():
    code = """
import sys
from cxr_lab import lungs, segment
assert not {'tensorflow', 'keras'} & set(sys.modules)
import numpy as np
network = segment.build_unet(32, (4, 8))
assert lungs.Segmenter(network)(np.zeros((2, 1, 32, 32), np.uint8)).shape == (2, 32, 32)
import torchvision, cxr_lab.train
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '' and done.stdout == '', done.stderr[-500:]
