"Lesson 08: what each experiment is allowed to see."
import cv2
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from cxr_lab.masked import (PLAIN, VIEWS, all_at_unit_proportion, look, look_at_all, plot_gap,
                            show_side_by_side, unit_proportion)
from cxr_lab.phantom import make_phantom

@pytest.fixture(scope='module')
def child(): return make_phantom(3, 1, size=128)

def disk(radius):
    y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    return x ** 2 + y ** 2 <= radius ** 2

def test_lungs_and_removed_are_complements(child):
    lungs, rest = (look(child.image, child.lung_mask, v, .03) for v in ('lungs', 'removed'))
    assert np.array_equal(lungs.astype(int) + rest, child.image) and not (lungs * rest.astype(int)).any()

def test_the_margin_is_a_dilation(child):
    "Against scipy's; the two discs may differ by a pixel on their rim."
    image = np.full_like(child.image, 200)
    seen = look(image, child.lung_mask, 'lungs', 5 / 128) > 0
    inner, outer = (binary_dilation(child.lung_mask, disk(r)) for r in (4, 6))
    assert (seen >= inner).all() and (seen <= outer).all()
    assert np.array_equal(look(image, child.lung_mask, 'lungs', 0) > 0, child.lung_mask)

@pytest.mark.parametrize('margin', [0, .03, .1])
def test_nothing_of_the_lungs_is_left_when_they_are_removed(child, margin):
    a = look(child.image, child.lung_mask, 'removed', margin)
    changed = child.image.copy()
    changed[child.lung_mask] = np.random.default_rng(0).integers(0, 256, child.lung_mask.sum())
    assert np.array_equal(a, look(changed, child.lung_mask, 'removed', margin))

def test_nothing_but_the_lungs_counts_in_lungs_only(child):
    changed = np.where(binary_dilation(child.lung_mask, disk(8)), child.image, 255 - child.image).astype(np.uint8)
    for view in ('lungs', 'silhouette'):
        assert np.array_equal(look(child.image, child.lung_mask, view, .03), look(changed, child.lung_mask, view, .03))

def test_the_silhouette_knows_no_pixel(child):
    assert np.array_equal(look(child.image, child.lung_mask, 'silhouette'), look(255 - child.image, child.lung_mask, 'silhouette'))
    assert np.array_equal(look(child.image, child.lung_mask, 'silhouette') > 0, child.lung_mask)

def test_the_crop_is_the_box(child):
    y, x = np.nonzero(child.lung_mask)
    box = child.image[y.min():y.max() + 1, x.min():x.max() + 1]
    assert np.array_equal(look(child.image, child.lung_mask, 'crop', 0), cv2.resize(box, (128, 128), interpolation=cv2.INTER_LINEAR))

def test_masks_at_the_border_stay_inside():
    mask = np.zeros((40, 40), bool); mask[:, :3] = True
    image = np.arange(1600).reshape(40, 40).astype(np.uint8)
    for view in VIEWS: assert look(image, mask, view, .2).shape == (40, 40)

def test_all_images_come_out_in_order():
    children = [make_phantom(s, s % 2, size=64) for s in range(6)]
    pixels, masks = np.stack([c.image for c in children])[:, None], np.stack([c.lung_mask for c in children])[:, None]
    for view in VIEWS:
        out = look_at_all(pixels, masks, view, 32)
        assert out.shape == (6, 1, 32, 32) and out.dtype == np.uint8 and out.any((1, 2, 3)).all()
        for i, c in enumerate(children):
            assert np.array_equal(out[i, 0], cv2.resize(look(c.image, c.lung_mask, view), (32, 32), interpolation=cv2.INTER_AREA))

def test_outlines_at_unit_proportion_come_out_in_order():
    masks = np.stack([make_phantom(s, s % 2, size=64).lung_mask for s in range(4)])[:, None]
    out = all_at_unit_proportion(masks, 32)
    assert out.shape == (4, 1, 32, 32) and out.dtype == np.uint8
    for seen, mask in zip(out, masks):
        assert np.array_equal(seen[0], cv2.resize(unit_proportion(mask[0]), (32, 32), interpolation=cv2.INTER_AREA))

def box_of(mask):
    _, _, wide, high = cv2.boundingRect(mask.astype(np.uint8))
    return wide / high

def test_the_crop_and_the_unit_outline_do_not_know_how_a_film_was_squared(child):
    "Both come out nearly the same when the film is made narrower first."
    def narrow(image, how): return cv2.copyMakeBorder(cv2.resize(image, (90, 128), interpolation=how), 0, 0, 19, 19, cv2.BORDER_REPLICATE)
    film, mask = narrow(child.image, cv2.INTER_AREA), narrow(child.lung_mask.astype(np.uint8), cv2.INTER_NEAREST) > 0
    assert box_of(mask) < .75 * box_of(child.lung_mask), 'the clue has moved'
    crops = [look(i, m, 'crop', 0).astype(float) for i, m in ((child.image, child.lung_mask), (film, mask))]
    assert np.abs(crops[0] - crops[1]).mean() < 6 and np.corrcoef(*(c.ravel() for c in crops))[0, 1] > .97
    outlines = [unit_proportion(m) > 127 for m in (child.lung_mask, mask)]
    assert (outlines[0] != outlines[1]).mean() < .03

def test_no_view_has_the_name_or_the_folder_of_another():
    assert not set(VIEWS) & set(PLAIN) and len({*VIEWS.values(), *PLAIN.values()}) == len(VIEWS | PLAIN)
    assert {v.removesuffix('_plain') for v in PLAIN} <= {*VIEWS, 'unit'}

def test_a_gap_is_drawn_from_validation_to_test():
    import matplotlib.pyplot as plt
    import pandas as pd
    results = pd.DataFrame(dict(val_auroc=[.9, 1.], test_auroc=[.7, .8], val_accuracy=[.9, .9], test_accuracy=[.8, .8]))
    fig = plot_gap({'one': results, 'other': results - .1}, 'a title')
    accuracy, auroc = fig.axes
    line, val, test = auroc.lines[:3]
    assert np.allclose(line.get_xdata(), [.95, .75]) and np.allclose(val.get_xdata(), [.9, 1]) and np.allclose(test.get_xdata(), [.7, .8])
    assert [t.get_text() for t in accuracy.get_legend().texts] == ['validation', 'test'], 'each is named once'
    assert [t.get_text() for t in accuracy.get_yticklabels()] == ['one', 'other'] and accuracy.get_ylim()[0] > accuracy.get_ylim()[1], 'from top to bottom'
    plt.close(fig)

def test_bad_input_is_refused(child):
    none = np.zeros_like(child.lung_mask)
    with pytest.raises(ValueError, match='empty'): look(child.image, none, 'lungs')
    with pytest.raises(ValueError, match='known: crop, lungs, removed, silhouette'): look(child.image, child.lung_mask, 'heart')
    with pytest.raises(ValueError, match='different sizes'): look(child.image[:50], child.lung_mask, 'lungs')
    with pytest.raises(ValueError, match='2 images and 1 masks'): look_at_all(np.zeros((2, 1, 8, 8), np.uint8), np.ones((1, 1, 8, 8), bool), 'lungs')
    with pytest.raises(ValueError, match='image 1: the mask is empty'):
        look_at_all(np.ones((2, 1, 8, 8), np.uint8), np.stack([np.ones((1, 8, 8), bool), np.zeros((1, 8, 8), bool)]), 'lungs', 8)

def test_an_all_zero_map_is_said_to_be_one(child):
    import matplotlib.pyplot as plt
    heat = np.zeros(child.image.shape, np.float32)
    for maps, said in ((heat, 1), (heat + child.lung_mask, 0)):
        fig = show_side_by_side([('one child', [(child.image, maps, 'a')])], ['whole'])
        assert sum(t.get_text() == 'all-zero map' for ax in fig.axes for t in ax.texts) == said
        plt.close(fig)
