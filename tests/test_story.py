"The default study, ten lessons on phantoms, tells the real data's story: the directions that the lessons rely on."
import os, subprocess, sys

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr_lab import train
from cxr_lab.data import Dataset, index_images, split_validation
from cxr_lab.images import find_data
from cxr_lab.masked import all_at_unit_proportion, look_at_all, unit_proportion
from cxr_lab.pipeline import lessons, notebook_parameters
from cxr_lab.runs import Step, read_json, read_predictions
from cxr_lab.scores import score
from cxr_lab.trainer import Experiment, run_experiments

STUDY = {k.name: k.default for path in lessons() for k in notebook_parameters(path).values() if path.stem in ('00_data', '03_train')}

PLACES = {'none': '03_train', 'both': '04_augment', 'geometry': '04_augment/geometric', 'exposure': '04_augment/photometric',
          'crop': '08_masked/crop_plain', 'silhouette': '08_masked/silhouette_plain', 'unit': '08_masked/unit_plain'}

def test_a_silhouette_at_unit_proportion():
    mask = np.zeros((60, 60), bool)
    mask[5:25, 30:58] = True
    seen = unit_proportion(mask) > 127
    assert np.abs(np.array([seen.any(a).sum() for a in (0, 1)]) - 48).max() <= 2
    assert np.abs(np.argwhere(seen).mean(0) - 29.5).max() <= 1
    wide = cv2.resize(mask.astype(np.uint8), (60, 30)).astype(bool)
    assert (unit_proportion(np.pad(wide, ((10, 20), (0, 0)))) > 127).sum() == pytest.approx(seen.sum(), rel=.08)
    with pytest.raises(ValueError, match='empty'): unit_proportion(mask & False)

def default_run(folder):
    "`cxr-lab run`, on all cores; a sentence of a lesson that is not true fails it."
    env = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_CORES'} | {'CXR_LAB_STRICT': '1'}
    done = subprocess.run([sys.executable, '-c', 'from cxr_lab.cli import main; main()', 'run'], cwd=folder, env=env,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode: raise RuntimeError(done.stderr)

@pytest.fixture(scope='module')
def run(once):
    return once('default-study', default_run)/'runs'/'default'

def measured(run, place):
    "Accuracy, specificity and AUROC of the networks of one recipe, in validation and test: means over seeds."
    rows = []
    for predictions in sorted((run/place).glob('seed_*/predictions.csv')):
        p = read_predictions(predictions)
        splits = {split: score(own.label, own.probability) for split, own in p.groupby('split')}
        rows.append({f'{split}_{k}': splits[split][k] for split in ('validation', 'test') for k in ('accuracy', 'specificity', 'auroc')})
    assert len(rows) == 3, place
    return pd.DataFrame(rows).mean()

@pytest.fixture(scope='module')
def story(run):
    table = pd.DataFrame({name: measured(run, place) for name, place in PLACES.items()}).T
    print(table.round(3))
    return table

@pytest.mark.slow
@pytest.mark.integration
def test_proportion_tells_the_class_in_train_and_hardly_in_test(run):
    told = read_json(run/'01_explore'/'metrics.json')
    assert .85 < told['proportion_auroc_train'] < .95
    assert .55 < told['proportion_auroc_test'] < .72

@pytest.mark.slow
def test_without_augmentation_much_is_lost_and_geometry_brings_it_back(story):
    accuracy = story.test_accuracy
    won = {name: accuracy[name] - accuracy['none'] for name in ('both', 'geometry', 'exposure')}
    assert won['both'] >= .10
    assert won['geometry'] > won['both'] / 2 and won['geometry'] > won['exposure'] + .05, 'most of it'
    assert story.validation_auroc['none'] > .97 > .95 > story.test_auroc['none'], 'validation does not tell'

@pytest.mark.slow
def test_the_crop_to_the_lungs_needs_no_augmentation(story):
    assert story.test_accuracy['crop'] - story.test_accuracy['none'] >= .10

@pytest.mark.slow
def test_the_gap_of_silhouettes_gets_smaller_at_unit_proportion(story):
    "With the masks of lesson 07; what is left of the gap is theirs, as the exact ones below show."
    gap = story.validation_auroc - story.test_auroc
    assert gap['silhouette'] > .10 and gap['unit'] < gap['silhouette'] - .05

@pytest.mark.slow
def test_the_gap_of_exact_silhouettes_closes_at_unit_proportion(tmp_path):
    source = find_data('phantom', STUDY['phantoms'], 0, study=True)
    size = STUDY['image_size']
    index = split_validation(index_images(source.images, size=size)[0], seed=0)
    step = Step(tmp_path, '00_data', dict(data='phantom', image_size=size, aspect='stretch', seed=0))
    step.record(dataset=dict(fingerprint='f' * 64, kind='phantom'))
    masks = np.stack([cv2.imread(str((source.lung_masks/p).with_suffix('.png')), 0) > 0 for p in index.path])[:, None]
    fine = np.zeros(masks.shape, np.uint8)  # a silhouette shows nothing of the picture
    views = {'silhouette': look_at_all(fine, masks, 'silhouette', size), 'unit': all_at_unit_proportion(masks, size)}
    settings = {k: STUDY[k] for k in ('model', 'epochs', 'batch_size', 'lr', 'weight_decay', 'seeds')} | {'seed': 0}
    experiments = [Experiment(view, Dataset(index, pixels, source), None, view) for view, pixels in views.items()]
    results = run_experiments(step, experiments, settings, train.PARTS)
    gap = {view: (r.val_auroc - r.test_auroc).mean() for view, r in results.items()}
    assert gap['silhouette'] > .10 and gap['unit'] < gap['silhouette'] / 2
