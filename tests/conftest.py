"What the tests share: a cache of their own, no progress bars, a small phantom data set, a data set in memory."
import gc, os, shutil, tempfile
from pathlib import Path

import pytest
from filelock import FileLock

gc.disable()  # until all tests are there: what is imported stays

_CACHE = tempfile.mkdtemp(prefix='cxr_lab-tests-')
os.environ.update(CXR_LAB_CACHE=_CACHE, CXR_LAB_PROGRESS='0', MPLBACKEND='Agg')
# Each core has a pytest worker already: one thread in it, before anything that computes is loaded.
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENCV_FOR_THREADS_NUM',
             'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'): os.environ.setdefault(name, '1')

os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path(__file__).parent/'early'), os.environ.get('PYTHONPATH')]))

from cxr_lab.cores import cores

_CORES = cores()
os.environ['CXR_LAB_CORES'] = '1'  # and no processes beside it, unless a test asks for them

REPO = Path(__file__).resolve().parent.parent

def pytest_xdist_auto_num_workers(config): return _CORES

def pytest_collection_modifyitems(items):
    "What takes longest starts first, so that no worker is left alone with it at the end."
    items.sort(key=lambda item: item.get_closest_marker('integration') is None)

def pytest_collection_finish(session):
    "PyTorch and the tests stay: nobody has to look through them for garbage."
    gc.freeze()
    gc.enable()

def pytest_unconfigure(config): shutil.rmtree(_CACHE, ignore_errors=True)

@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "`once(name, make)`: the folder that `make(folder)` fills, for all workers, by the first that asks."
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    def get(name, make):
        folder, complete = shared/name, shared/f'{name}.complete'
        with FileLock(shared/f'{name}.lock'):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder
    return get

@pytest.fixture(scope='session')
def repo(): return REPO

@pytest.fixture(scope='session')
def real_data():
    "The folder with the real images, or a skip."
    folder = Path(os.environ.get('CXR_LAB_DATA') or REPO.parent/'shared'/'data')
    if not (folder/'chest_xray').is_dir(): pytest.skip('the real images are not here; CXR_LAB_DATA names the folder that holds chest_xray/')
    return folder

@pytest.fixture(scope='session')
def phantom_root(once):
    "112 small phantoms in the layout of the real data; read only, copy before changing."
    from cxr_lab.phantom import write_phantoms
    made = dict(n_train=64, n_val=8, n_test=40, size=64, seed=3)
    return once('phantoms', lambda folder: write_phantoms(folder/'data', **made))/'data'

@pytest.fixture(scope='session')
def phantom_images(phantom_root): return phantom_root/'chest_xray'

@pytest.fixture(scope='session')
def phantom_index(phantom_images):
    from cxr_lab.data import index_images
    return index_images(phantom_images)[0]

@pytest.fixture(scope='session')
def chests(phantom_root):
    "Index, 64-pixel images and outlines of the small phantoms."
    from cxr_lab.data import Dataset, index_images, split_validation
    from cxr_lab.images import Source, pixel_cache
    from cxr_lab.lungs import lung_outlines
    source = Source('phantom', phantom_root/'chest_xray', phantom_root/'lung_masks')
    index = split_validation(index_images(source.images)[0], .2)
    data = Dataset(index, pixel_cache(source.images, index, 64), source)
    return data, *lung_outlines(source, index, 64)

@pytest.fixture(scope='session')
def tiny():
    "200 images in memory, 32 pixels: class 1 has a faint bright disk. Learnable in seconds, not perfectly."
    import numpy as np, pandas as pd
    from cxr_lab.data import Dataset
    from cxr_lab.images import Source
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
