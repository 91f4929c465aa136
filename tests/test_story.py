"The phantoms of the study tell the real data's story: directions that the lessons rely on, three seeds each."
import cv2
import numpy as np
import pandas as pd
import pytest

from cxr_lab import train
from cxr_lab.augment import Augment
from cxr_lab.data import Dataset, index_images, split_validation
from cxr_lab.images import find_data, pixel_cache
from cxr_lab.masked import all_at_unit_proportion, look_at_all, unit_proportion
from cxr_lab.runs import Step
from cxr_lab.trainer import Experiment, run_experiments

SIZE = 64
PARAMS = dict(model='small', epochs=24, batch_size=64, lr=3e-3, weight_decay=.02, seeds=3, seed=0)

def test_a_silhouette_at_unit_proportion():
    mask = np.zeros((60, 60), bool)
    mask[5:25, 30:58] = True
    seen = unit_proportion(mask) > 127
    assert np.abs(np.array([seen.any(a).sum() for a in (0, 1)]) - 48).max() <= 2
    assert np.abs(np.argwhere(seen).mean(0) - 29.5).max() <= 1
    wide = cv2.resize(mask.astype(np.uint8), (60, 30)).astype(bool)
    assert (unit_proportion(np.pad(wide, ((10, 20), (0, 0)))) > 127).sum() == pytest.approx(seen.sum(), rel=.08)
    with pytest.raises(ValueError, match='empty'): unit_proportion(mask & False)

@pytest.fixture(scope='module')
def story(tmp_path_factory):
    "Accuracy and AUROC of each recipe, means over seeds."
    source = find_data('phantom', 600, 0, study=True)
    index = split_validation(index_images(source.images, size=SIZE)[0], seed=0)
    step = Step(tmp_path_factory.mktemp('story'), '00_data', dict(data='phantom', image_size=SIZE, aspect='stretch', seed=0))
    step.record(dataset=dict(fingerprint='f' * 64, kind='phantom'))
    whole, fine = pixel_cache(source.images, index, SIZE), pixel_cache(source.images, index, 224)
    masks = np.stack([cv2.imread(str((source.lung_masks/p).with_suffix('.png')), 0) > 0 for p in index.path])[:, None]
    views = {v: look_at_all(fine, masks, v, SIZE) for v in ('crop', 'silhouette')} | {'unit': all_at_unit_proportion(masks, SIZE), 'whole': whole}
    of = {v: Dataset(index, pixels, source) for v, pixels in views.items()}
    recipes = {'none': ('whole', None), 'both': ('whole', Augment()), 'geometry': ('whole', Augment(photometric=0)),
               'exposure': ('whole', Augment(geometric=0)), 'crop': ('crop', None),
               'silhouette': ('silhouette', None), 'unit': ('unit', None)}
    experiments = [Experiment(name, of[view], augment, name) for name, (view, augment) in recipes.items()]
    results = run_experiments(step, experiments, PARAMS, train.PARTS)
    table = pd.DataFrame({name: r[['val_auroc', 'test_auroc', 'test_accuracy', 'test_specificity']].mean() for name, r in results.items()}).T
    print(table.round(3))
    return table

@pytest.mark.slow
def test_without_augmentation_much_is_lost_and_geometry_brings_it_back(story):
    accuracy = story.test_accuracy
    won = {name: accuracy[name] - accuracy['none'] for name in ('both', 'geometry', 'exposure')}
    assert won['both'] >= .10
    assert won['geometry'] > won['both'] / 2 and won['geometry'] > won['exposure'] + .05, 'most of it'
    assert story.val_auroc['none'] > .97 > .95 > story.test_auroc['none'], 'validation does not tell'

@pytest.mark.slow
def test_the_crop_to_the_lungs_needs_no_augmentation(story):
    assert story.test_accuracy['crop'] - story.test_accuracy['none'] >= .10

@pytest.mark.slow
def test_the_gap_of_silhouettes_closes_at_unit_proportion(story):
    gap = story.val_auroc - story.test_auroc
    assert gap['silhouette'] > .10 and gap['unit'] < gap['silhouette'] / 2
