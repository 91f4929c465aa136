"""What twenty times as many images cost: index, cache, split, training, prediction, intervals.

Each stage runs in a process of its own. Time is processor time per image, so that a stage on all
cores and a stage on one are measured alike. Memory is the highest that the process has had for
itself, above what it had after its imports; pages of mapped files, which the system may drop at any
time, are not in it. Some of it must grow: a table with a row per image, and what is read of it.
"""
import argparse, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path

from common import arguments, report

SIZE = 64      # pixels of the files
SMALL = 32     # pixels of the cached images
PER_IMAGE = 3  # KB of memory that an image may cost: its row of the index, while the table is made
STAGES = ('index', 'index and cache', 'cache', 'split', 'training, an epoch', 'prediction',
          'intervals')

def make_images(root: Path, n: int, sources: list[bytes]):
    "A few JPEG files as n images of n / 2 patients: each gets bytes of its own after its end."
    for split in ('train', 'test'):
        for c in ('NORMAL', 'PNEUMONIA'): (root/split/c).mkdir(parents=True)
    for i in range(n):
        split, patient = 'test' if i % 10 > 7 else 'train', i // 2
        ill = patient % 4 > 0
        name = f'person{patient}_virus_{i}.jpeg' if ill else f'IM-{patient:06d}-{i:06d}.jpeg'
        content = sources[i % len(sources)] + f'{i:08d}'.encode()
        (root/split/('PNEUMONIA' if ill else 'NORMAL')/name).write_bytes(content)

def own_memory() -> float:
    "MB of this process that no file stands behind."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) / 1024

def prepared(stage: str, folder: Path, n: int):
    "Imports and reads what a stage needs; returns the work."
    import pandas as pd
    from cxr_lab.data import Dataset, index_images, split_validation
    from cxr_lab.images import Source, pixel_cache
    root, table, cache = folder/'images', folder/'index.csv', folder/'cache'
    if stage == 'index': return lambda: index_images(root)[0].to_csv(table, index=False)
    if stage == 'index and cache':
        return lambda: index_images(root, size=SMALL, folder=folder/'cache in one pass')
    index = pd.read_csv(table, keep_default_na=False)
    if stage == 'cache': return lambda: pixel_cache(root, index, SMALL, folder=cache)
    if stage == 'split': return lambda: split_validation(index)
    if stage == 'intervals':
        import numpy as np
        from cxr_lab.scores import intervals
        intervals(index.head(100).assign(probability=.5), n_boot=2)  # imports what it needs
        told = index.assign(probability=np.random.default_rng(0).random(n))
        return lambda: intervals(told)
    import torch
    from cxr_lab.model import build_model
    from cxr_lab.networks import predict
    from cxr_lab.train import PARTS
    from cxr_lab.trainer import fit
    torch.set_num_threads(1)
    pixels = pixel_cache(root, index, SMALL, folder=cache)
    data = Dataset(split_validation(index), pixels, Source('folder', root))
    if stage == 'prediction': return lambda: predict(build_model('small'), data.pixels)
    (folder/'fit').mkdir(exist_ok=True)
    settings = dict(seed=0, epochs=1, batch_size=64, lr=3e-3, weight_decay=.02)
    about = dict(model='small', image_size=SMALL, aspect='stretch', trained_on='benchmark')
    return lambda: fit(build_model('small'), data, folder/'fit', about, PARTS, **settings)

def one_stage(stage: str, folder: Path, n: int) -> dict:
    "Milliseconds of a core per image, and MB beyond what was there before."
    work = prepared(stage, folder, n)
    peak, done, before = [0.], threading.Event(), own_memory()
    def watch():
        while not done.wait(.005): peak[0] = max(peak[0], own_memory())
    threading.Thread(target=watch, daemon=True).start()
    begin = time.process_time()
    work()
    spent = time.process_time() - begin
    done.set()
    return dict(ms=spent / n * 1e3, mb=max(0., peak[0] - before))

def in_a_process(stage, folder, n) -> dict:
    command = [sys.executable, __file__, '--stage', stage, '--folder', str(folder), '--n', str(n)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'{stage} of {n} images failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])

def measure(sizes, sources, work):
    "stage -> {n: ms and MB}"
    found = {stage: {} for stage in STAGES}
    for n in sizes:
        folder = work/f'{n}'
        folder.mkdir()
        make_images(folder/'images', n, sources)
        for stage in STAGES:
            found[stage][n] = in_a_process(stage, folder, n)
            print(f'{n} images, {stage}: {found[stage][n]}', flush=True)
    return found

def checked(found, sizes):
    "Rows of the table, and whether time and memory grow as they may."
    rows, checks, first, last = [], {}, sizes[0], sizes[-1]
    for stage, at in found.items():
        times = {f'{n:,}: ms of a core per image': f'{at[n]["ms"]:.3f}' for n in sizes}
        rows.append({'stage': stage} | times | {f'{n:,}: MB': f'{at[n]["mb"]:.0f}' for n in sizes})
        ratio = at[last]['ms'] / at[first]['ms']
        what = f'{stage}: time per image, {last:,} against {first:,}'
        checks[what] = (ratio, '1.2 at most', ratio <= 1.2)
        more = (at[last]['mb'] - at[first]['mb']) * 1024 / (last - first)
        what = f'{stage}: KB of memory per further image'
        checks[what] = (more, f'{PER_IMAGE} at most', more <= PER_IMAGE)
    return rows, checks

if __name__ == '__main__':
    if '--stage' in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument('--stage', choices=STAGES)
        parser.add_argument('--folder', type=Path)
        parser.add_argument('--n', type=int)
        own = parser.parse_args()
        print(json.dumps(one_stage(own.stage, own.folder, own.n)))
        sys.exit()
    a = arguments(__doc__, sizes=('5856,25000,112000', 'numbers of images, from small to large'))
    load, sizes = round(os.getloadavg()[0], 1), [int(n) for n in a.sizes.split(',')]
    os.environ.update(CXR_LAB_PROGRESS='0', OMP_NUM_THREADS='1')
    with tempfile.TemporaryDirectory(prefix='cxr_lab-benchmark-') as folder:
        from cxr_lab.phantom import write_phantoms
        made = write_phantoms(Path(folder)/'phantoms', n_train=240, n_val=20, n_test=40, size=SIZE)
        sources = [p.read_bytes() for p in sorted(made.glob('chest_xray/*/*/*.jpeg'))]
        rows, checks = checked(measure(sizes, sources, Path(folder)), sizes)
    title = f'More images ({SIZE} px phantoms, cached and trained at {SMALL} px)'
    report('growth', title, rows, checks, a.write, load=load, sizes=a.sizes)
