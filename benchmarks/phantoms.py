"Making synthetic radiographs, with their masks, files included."
import os, tempfile, time
from pathlib import Path

from common import arguments, report

if __name__ == '__main__':
    a = arguments(__doc__, images=(500, 'how many'), size=(224, 'pixels'))
    os.environ['CXR_LAB_PROGRESS'] = '0'
    load = round(os.getloadavg()[0], 1)
    from cxr_lab.phantom import write_phantoms
    with tempfile.TemporaryDirectory() as folder:
        begin, test = time.perf_counter(), max(8, a.images//4)
        root = write_phantoms(Path(folder)/'phantoms', n_train=a.images - test - 8, n_val=8, n_test=test, size=a.size)
        took = time.perf_counter() - begin
        n = sum(1 for _ in (root/'chest_xray').rglob('*.jpeg'))
    rows = [{'what': f'phantoms, {a.size} px', 'images': n, 'seconds': took, 'images/s': n/took}]
    report('phantoms', 'Making phantoms', rows, {f'seconds for {n} images': (took, 60, took < 60)}, a.write, load=load, images=a.images, size=a.size)
