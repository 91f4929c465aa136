"""Processor time of a start, each in a fresh process: imports against `import torch`, the command
line against `python -c pass`."""
import os, resource, shutil, statistics, subprocess, sys, tempfile
from pathlib import Path

from common import arguments, report

CLI = 'from cxr_lab.cli import main; main()'
STARTS = {
    'python -c pass': ['-c', 'pass'], 'import torch': ['-c', 'import torch'],
    'import cxr_lab.predict': ['-c', 'import cxr_lab.predict'],
    'import cxr_lab.train': ['-c', 'import cxr_lab.train'],
    'cxr-lab --help': ['-c', CLI, '--help'],
    'cxr-lab predict one.jpeg': ['-c', CLI, 'predict', 'one.jpeg']}

def processor_seconds(command: list[str], folder: str) -> float:
    "User and system time of a fresh Python process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

if __name__ == '__main__':
    a = arguments(__doc__, rounds=(7, 'of every start, one after the other'))
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix='cxr_lab-benchmark-') as folder:
        import cv2
        from cxr_lab.phantom import make_phantom
        cv2.imwrite(str(Path(folder)/'one.jpeg'), make_phantom(1, 0, 1024).image)
        repository = Path(__file__).resolve().parent.parent
        os.environ.update(PYTHONPATH=str(repository), CXR_LAB_PROGRESS='0')
        taken = {name: [] for name in STARTS}
        for r in range(a.rounds + 1):  # the first compiles what was never imported here
            for name, command in STARTS.items():
                seconds = processor_seconds(command, folder)
                if r: taken[name].append(seconds)
            shutil.rmtree(Path(folder)/'predictions')  # an answer is not given twice into one folder
    def median(name): return statistics.median(taken[name])
    def ratio(name, base):
        return statistics.median(x/y for x, y in zip(taken[name], taken[base], strict=True))
    rows = [{'start': name, 'processor seconds': median(name),
             'times `import torch`': ratio(name, 'import torch'),
             'times `python -c pass`': ratio(name, 'python -c pass')} for name in STARTS]
    light = ratio('import cxr_lab.predict', 'import torch')
    shown, answered = median('cxr-lab --help'), median('cxr-lab predict one.jpeg')
    checks = {'import cxr_lab.predict, times `import torch`': (light, 1.3, light <= 1.3),
              'cxr-lab --help, processor seconds': (shown, .5, shown <= .5),
              'cxr-lab predict one.jpeg, processor seconds': (answered, 5, answered <= 5)}
    report('startup', 'Starts', rows, checks, a.write, load=load, rounds=a.rounds)
