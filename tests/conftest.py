"What the tests share: a cache of their own, no progress bars, a small phantom data set, a data set in memory."
import os, shutil, tempfile
from pathlib import Path

import pytest

_CACHE = tempfile.mkdtemp(prefix='cxr_lab-tests-')
os.environ.update(CXR_LAB_CACHE=_CACHE, CXR_LAB_PROGRESS='0', MPLBACKEND='Agg')
os.environ.setdefault('OMP_NUM_THREADS', '2')  # results do not depend on it; more threads only fight over small arrays

REPO = Path(__file__).resolve().parent.parent

def pytest_unconfigure(config): shutil.rmtree(_CACHE, ignore_errors=True)

@pytest.fixture(scope='session')
def repo(): return REPO

@pytest.fixture(scope='session')
def real_data():
    "The folder with the real images, or a skip."
    folder = Path(os.environ.get('CXR_LAB_DATA') or REPO.parent/'shared'/'data')
    if not (folder/'chest_xray').is_dir(): pytest.skip('the real images are not here; CXR_LAB_DATA names the folder that holds chest_xray/')
    return folder

@pytest.fixture(scope='session')
def phantom_root(tmp_path_factory):
    "112 small phantoms in the layout of the real data; read only, copy before changing."
    from cxr_lab.phantom import write_phantoms
    return write_phantoms(tmp_path_factory.mktemp('phantoms')/'data', n_train=64, n_val=8, n_test=40, size=64, seed=3)

@pytest.fixture(scope='session')
def phantom_images(phantom_root): return phantom_root/'chest_xray'

@pytest.fixture(scope='session')
def phantom_index(phantom_images):
    from cxr_lab.data import index_images
    return index_images(phantom_images)[0]

@pytest.fixture(scope='session')
def tiny():
    "200 images in memory, 32 pixels: class 1 has a faint bright disk. Learnable in seconds, not perfectly."
    import numpy as np, pandas as pd
    from cxr_lab.data import Dataset, Source
    rng, n = np.random.default_rng(0), 200
    label = (rng.random(n) < .6).astype(int)
    split = np.repeat(['train', 'validation', 'test', 'official_val'], [120, 36, 40, 4])
    pixels = rng.normal(110, 30, (n, 1, 32, 32))
    y, x = np.mgrid[:32, :32]
    for i in np.flatnonzero(label):
        a, b = rng.integers(8, 24, 2)
        pixels[i, 0] += 38 * ((y - a)**2 + (x - b)**2 < 30)
    index = pd.DataFrame(dict(path=[f'{s}/{i:03d}.jpeg' for i, s in enumerate(split)], split=split, label=label, patient=[f'{s}{i // 2}' for i, s in enumerate(split)], subtype='',
                              width=32, height=32, mode='L', bytes=1, sha256=[f'{i:064x}' for i in range(n)]))
    return Dataset(index, pixels.clip(0, 255).astype(np.uint8), Source('phantom', Path('images')))
