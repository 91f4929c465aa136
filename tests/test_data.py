"Whose images they are, who validates, and what the lessons load."
import numpy as np
import pandas as pd
import pytest
import sklearn
from packaging.version import Version
from sklearn.model_selection import StratifiedGroupKFold

from cxr_lab.data import (Dataset, Leakage, check_no_leakage, index_images, join_identical, leaked_share,
                          load_dataset, patient_of, split_validation, subtype_of)
from cxr_lab.runs import MissingUpstream, Step
from layouts import encoded, first, gray, layout

@pytest.fixture
def root(tmp_path): return layout(tmp_path/'images')


# Patients and splits

def test_patient_keys():
    assert patient_of('person23_bacteria_81.jpeg') == patient_of('person23_bacteria_82.jpeg') == 'person23_bacteria'
    assert len({patient_of(f) for f in ('person1_virus_6.jpeg', 'person1_bacteria_6.jpeg', 'person11_virus_6.jpeg', 'IM-0115-0001.jpeg', 'NORMAL2-IM-0115-0001.jpeg')}) == 5
    assert patient_of('NORMAL2-IM-0383-0001-0002.jpeg') == 'NORMAL2-IM-0383'
    assert [subtype_of(f) for f in ('person1_virus_6.jpeg', 'person1_bacteria_6.jpeg', 'IM-0115-0001.jpeg', 'x.jpeg')] == ['virus', 'bacteria', '', '']
    for name in ('holiday.jpeg', 'xperson1_virus_6.jpeg', 'person_virus_6.jpeg', ''):
        with pytest.raises(ValueError, match='does not name a patient'): patient_of(name)

def test_other_names_need_other_groups(root, tmp_path):
    first(root).rename(root/'train/NORMAL/holiday.jpeg')
    with pytest.raises(ValueError, match="'holiday.jpeg' does not name a patient.*groups='image'.*groups=CSV"): index_images(root)
    index, _ = index_images(root, 'image')
    assert index.patient.nunique() == 12
    table = index[['path']].assign(patient=['01', '1', *'abcdefghij'])
    table.to_csv(tmp_path/'who.csv', index=False)
    assert list(index_images(root, str(tmp_path/'who.csv'))[0].patient) == list(table.patient)
    table[1:].to_csv(tmp_path/'who.csv', index=False)
    with pytest.raises(ValueError, match=f'names no patient for 1 images, e.g. {table.path[0]}'): index_images(root, str(tmp_path/'who.csv'))
    table.drop(columns='patient').to_csv(tmp_path/'who.csv', index=False)
    with pytest.raises(ValueError, match='needs the columns path and patient, found path'): index_images(root, str(tmp_path/'who.csv'))
    with pytest.raises(FileNotFoundError, match="neither 'names', 'image' nor a CSV"): index_images(root, str(tmp_path/'none.csv'))

def test_join_identical_against_a_naive_closure():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 40))
        patients = pd.Series([f'p{i:02d}' for i in rng.integers(0, 15, n)])
        hashes = pd.Series([f'h{i:02d}' for i in rng.integers(0, 25, n)])
        joined = join_identical(patients, hashes)
        names = patients.copy()
        while True:  # the smallest name spreads along shared patients and shared contents until nothing changes
            new = names.groupby(patients).transform('min').groupby(hashes).transform('min')
            if (new == names).all(): break
            names = new
        assert list(joined) == list(names)

def test_identical_files_join_their_patients(root):
    a, b = sorted((root/'train/PNEUMONIA').iterdir())[:2]
    b.write_bytes(a.read_bytes())
    patients = index_images(root)[0].set_index('path').patient
    assert patients[a.relative_to(root).as_posix()] == patients[b.relative_to(root).as_posix()] == 'person0_virus'

def made_up(seed, n=400):
    "An index with patients of very different sizes."
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, 150, n); patient[:30] = 999
    label = (patient % 4 > 0).astype(int)
    split = np.where(np.arange(n) < n - 60, 'train', 'test'); split[-5:] = 'val'
    patient = patient + 1000 * (split == 'test') + 5000 * (split == 'val')
    return pd.DataFrame(dict(path=[f'{i:04d}.jpeg' for i in range(n)], split=split, label=label, patient=patient.astype(str), sha256=[f'{seed}-{i}' for i in range(n)])).sample(frac=1, random_state=seed)

@pytest.mark.parametrize('fraction', [.1, .15, .25, .5])
def test_validation_split_is_grouped_stratified_and_seeded(fraction):
    for seed in range(5):
        index = made_up(seed)
        done = split_validation(index, fraction, seed)
        assert check_no_leakage(done) == done.patient.nunique() and leaked_share(done) == 0
        assert (done.drop(columns='split') == index.drop(columns='split')).all(axis=None) and (done.index == index.index).all()
        assert (done.split[index.split == 'test'] == 'test').all() and (done.split[index.split == 'val'] == 'official_val').all()
        train, held = done[done.split == 'train'], done[done.split == 'validation']
        assert len(train) + len(held) == (index.split == 'train').sum()
        assert abs(len(held) / (len(train) + len(held)) - fraction) < .06 and abs(held.label.mean() - train.label.mean()) < .12
        assert (split_validation(index, fraction, seed).split == done.split).all()
        assert (split_validation(index, fraction, seed + 1).split != done.split).any()

@pytest.mark.skipif(Version(sklearn.__version__) < Version('1.8'), reason='it shuffled by another rule before')
@pytest.mark.parametrize('n', [150, 400, 3000])
@pytest.mark.parametrize('folds', [2, 3, 7, 10])
def test_validation_split_is_that_of_scikit_learn(n, folds):
    "Row for row: the split of a study must not depend on the version of a library, or on its speed."
    for seed, images in enumerate([1, 2, 3.5]):
        rng = np.random.default_rng(seed)
        who = rng.integers(0, int(n / images), n)
        label = np.where(rng.random(n) < .05, 1, who % 3 > 0).astype(int)  # some patients have both
        index = pd.DataFrame(dict(split='train', label=label, patient=[f'person{i}' for i in who]))
        done = split_validation(index, 1 / folds, seed)
        by = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        _, held_out = next(by.split(index, index.label, index.patient))
        assert np.array_equal(np.flatnonzero(done.split == 'validation'), held_out), seed

@pytest.mark.parametrize('fraction', [0, -.1, .51, 1, 15, float('nan')])
def test_impossible_fractions(fraction):
    with pytest.raises(ValueError, match='val_fraction=.*a share above 0, at most 0.5'): split_validation(made_up(0), fraction)

def test_too_few_patients_to_split(root):
    with pytest.raises(ValueError, match=r'3 patients of class (NORMAL|PNEUMONIA) in train are too few for val_fraction=0.15: at least 7 are needed'):
        split_validation(index_images(root)[0])

def test_check_no_leakage_finds_patients_and_contents():
    index = split_validation(made_up(1))
    one = index[index.split == 'train'].iloc[0]
    for other, key in [('validation', 'patient'), ('test', 'patient'), ('official_val', 'sha256')]:
        victim = index.index[index.split == other][0]
        bad = index.copy(); bad.loc[victim, key] = one[key]
        with pytest.raises(Leakage, match=f'1 {key} values are in more than one split, e.g. {one[key]}'): check_no_leakage(bad)
    moved = index.copy(); moved.loc[index.index[index.patient == '999'][0], 'split'] = 'test'
    with pytest.raises(Leakage, match='999'): check_no_leakage(moved)

def test_leaked_share_counts_images():
    index = pd.DataFrame(dict(split=['train', 'train', 'validation', 'validation', 'validation', 'test'], patient=list('abacdb')))
    assert leaked_share(index) == pytest.approx(1 / 3)


# load_dataset

def prepared(root, tmp_path, **changes):
    "What lesson 00 leaves."
    step = Step(tmp_path/'run', '00_data', dict(data=str(root), groups='names', image_size=32, aspect='stretch', val_fraction=.5, seed=0, phantoms=8) | changes)
    index = split_validation(index_images(root, step.params('00_data')['groups'])[0], .5)
    step.write_csv(index, 'index.csv')
    return step, index

def test_load_dataset_round_trip(root, tmp_path):
    step, index = prepared(root, tmp_path)
    loaded = load_dataset(step)
    assert loaded.index.astype(str).equals(index.astype(str)) and loaded.source.kind == 'folder'
    assert (loaded.index.patient[loaded.rows('test')] == index.patient[index.split == 'test']).all() and list(loaded.labels) == list(index.label)
    assert sorted(np.concatenate([loaded.rows(s) for s in ('train', 'validation', 'test')])) == list(range(12)) and not len(loaded.rows('official_val'))
    assert isinstance(loaded, Dataset)
    assert repr(loaded) == "Dataset(12 images of 32 x 32 pixels, Source('folder', images/))"

def test_load_dataset_keeps_patient_names_that_look_like_numbers(root, tmp_path):
    names = [f'{i:03d}' for i in range(10)] + ['10', '010']
    index_images(root, 'image')[0][['path']].assign(patient=names).to_csv(tmp_path/'who.csv', index=False)
    step, index = prepared(root, tmp_path, groups=str(tmp_path/'who.csv'))
    assert list(load_dataset(step).index.patient) == names

def test_load_dataset_without_lesson_00(tmp_path):
    with pytest.raises(MissingUpstream, match='run notebook 00_data first'): load_dataset(Step(tmp_path/'run', '03_train', {}))

def test_load_dataset_when_the_files_changed(root, tmp_path, monkeypatch):
    step, index = prepared(root, tmp_path)
    (root/index.path[0]).write_bytes(encoded(gray(seed=77)))
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path/'empty'))
    with pytest.raises(RuntimeError, match='has changed since it was indexed: run 00_data again'): load_dataset(step)


# The real images

def test_real_split_leaks_nothing(real_data):
    index = index_images(real_data/'chest_xray')[0]
    for seed in range(3):
        done = split_validation(index, .15, seed)
        assert check_no_leakage(done) > 2000 and leaked_share(done) == 0
        held, train = done[done.split == 'validation'], done[done.split == 'train']
        assert abs(len(held) / 5216 - .15) < .02 and abs(held.label.mean() - train.label.mean()) < .02 and (done.split == 'official_val').sum() == 16
