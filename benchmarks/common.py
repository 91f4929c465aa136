"What the benchmarks share: data, machine facts, tables. `python benchmarks/common.py` makes benchmarks/README.md from benchmarks/results/."
import argparse, json, os, platform, shutil, statistics, tempfile, time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent

QUIET = .1  # share of the processor that may be busy with something else when results are to be kept

def busy_share(seconds: float = 2) -> float:
    "Share of all cores that is busy, over some seconds in which this process waits."
    import psutil
    return psutil.cpu_percent(interval=seconds) / 100

def arguments(description, **options):  # name -> (default, help)
    "Command line: the options, and --write, which is refused while something else uses the processor."
    parser = argparse.ArgumentParser(description=description)
    for name, (default, text) in options.items(): parser.add_argument(f'--{name}', type=type(default), default=default, help=f'{text} ({default})')
    parser.add_argument('--write', action='store_true', help='write benchmarks/results/<name>.json and benchmarks/README.md')
    found = parser.parse_args()
    if found.write and (busy := busy_share()) > QUIET:
        parser.exit(1, f'--write: {busy:.0%} of the processor was busy for two seconds, expected at most {QUIET:.0%}; '
                       'times would be those of both. Wait until nothing else runs, or leave --write out\n')
    return found

def machine() -> dict:
    "What a time depends on, besides the code."
    import torch
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        cpu = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')), cpu)
    return dict(cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(), cpu=cpu, torch_threads=torch.get_num_threads(),
                load_before=round(os.getloadavg()[0], 1), python=platform.python_version(), **{name: version(name) for name in ('torch', 'torchvision', 'numpy', 'pillow')})

def seconds(work, repeats=3) -> float:
    "Median time of some repetitions."
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)

@contextmanager
def image_folder(images: int):
    "The data set that CXR_LAB_DATA names, or phantoms, in the {train,val,test}/{CLASS}/ layout; what it is; and a folder for everything that is written."
    os.environ['CXR_LAB_PROGRESS'] = '0'
    work = Path(tempfile.mkdtemp(prefix='cxr_lab-benchmark-'))
    os.environ['CXR_LAB_CACHE'] = str(work/'cache')
    try:
        real = os.environ.get('CXR_LAB_DATA')
        if real: source, what = Path(real)/'chest_xray', 'Kermany images, 224 px'
        else:
            from cxr_lab.phantom import write_phantoms
            source, what = write_phantoms(work/'source', n_train=images, n_val=8, n_test=40)/'chest_xray', 'phantoms, 224 px'
        root = work/'images'  # links, so that both sides read the same selection of files
        for folder in sorted(source.glob('*/*/')):
            (root/folder.relative_to(source)).mkdir(parents=True)
            files = sorted(p for p in folder.iterdir() if p.is_file())
            train = folder.parent.name == 'train'
            share = round(images*len(files)/max(1, sum(1 for _ in (source/'train').glob('*/*')))) if train else 40
            for path in files[:max(20, share)]: (root/path.relative_to(source)).symlink_to(path.resolve())
        yield root, what, work
    finally: shutil.rmtree(work, ignore_errors=True)

def dataset(root: Path, size: int = 128, validation: bool = True):
    "A Dataset as lesson 00 makes it, with or without a validation split, and the seconds it took."
    from cxr_lab.data import Dataset, index_images, split_validation
    from cxr_lab.images import Source, pixel_cache
    begin = time.perf_counter()
    index, rejected = index_images(root, size=size)
    assert not len(rejected), rejected
    pixels = pixel_cache(root, index, size)
    seconds = time.perf_counter() - begin
    if validation: index = split_validation(index)
    return Dataset(index, pixels, Source('folder', root)), seconds

def markdown(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [head, ['---'] + ['---:']*(len(head) - 1)] + [[f'{v:,.2f}' if isinstance(v, float) and v < 10 else f'{v:,.0f}' if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)

def report(name: str, title: str, rows: list[dict], checks: dict, write: bool, **settings):
    "Prints the table and whether the bars are reached; with `write` keeps them."
    facts = machine() | {'load_before': settings.pop('load')}
    print(f'### {title}\n\n{markdown(rows)}\n')
    for text, (value, bar, ok) in checks.items(): print(f'{"reached" if ok else "MISSED"}: {text}: {value:,.1f} (bar {bar})')
    print(json.dumps(facts))
    if not write: return
    results = dict(title=title, settings=settings, machine=facts, rows=rows, checks={k: dict(value=round(v, 2), bar=bar, reached=bool(ok)) for k, (v, bar, ok) in checks.items()})
    (HERE/'results').mkdir(exist_ok=True)
    (HERE/'results'/f'{name}.json').write_text(json.dumps(results, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    write_readme()

INTRO = """<!-- Made by benchmarks/common.py from benchmarks/results/*.json; edit that file. -->

# Benchmarks

Measured side by side with what one would run otherwise, on the same files, in the same process, and checked to give the same result.

```bash
python benchmarks/loading.py    # an epoch from the pixel cache against torchvision's ImageFolder
python benchmarks/training.py   # training with augmentation against the loop that tutorials write
python benchmarks/phantoms.py   # making synthetic X-rays
python benchmarks/gradcam.py    # Grad-CAM against the package grad-cam
python benchmarks/segment.py    # lung masks against the published U-Net with its image-by-image preprocessing
python benchmarks/tsne.py       # embeddings against a plain loop, maps against scikit-learn's TSNE
python benchmarks/predict.py    # answers for files against a plain loop, without and with heatmaps, and memory over many files
python benchmarks/sweep.py      # a grid on Dask workers against papermill in a loop
python benchmarks/startup.py    # processor time of imports and of the command line
python benchmarks/unusual.py    # which images are warned of: false warnings, and each kind that is no upright chest X-ray
python benchmarks/growth.py     # what each step costs per image, and in memory, for 5,856 to 112,000 images
```

Each prints a table; `--write` keeps it in `results/` and in this page, `--help` lists the sizes that can be set. `CXR_LAB_DATA` names the folder with the real images;
phantoms are used without it. Let nothing else run meanwhile: `--write` is refused while something else uses the processor, and the load
before the start is part of the result.
"""

def write_readme():
    parts = [INTRO]
    for path in sorted((HERE/'results').glob('*.json')):
        r = json.loads(path.read_text(encoding='utf-8'))
        m, settings = r['machine'], ', '.join(f'{k} {v}' for k, v in r['settings'].items())
        parts.append(f"## {r['title']}\n\n{markdown(r['rows'])}\n")
        parts += [f"- {text}: {c['value']:,.1f}, the bar is {c['bar']}{'' if c['reached'] else ' (**missed**)'}" for text, c in r['checks'].items()]
        parts.append(f"\n{settings}; {m['cores']} cores ({m['cpu']}), load {m['load_before']} before; Python {m['python']}, torch {m['torch']}, torchvision {m['torchvision']}, Pillow {m['pillow']}.\n")
    (HERE/'README.md').write_text('\n'.join(parts), encoding='utf-8')

if __name__ == '__main__': write_readme()
