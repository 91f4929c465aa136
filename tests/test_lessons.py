"The lessons as a whole: what their cells import, parameter cells, what is committed, and the study from end to end."
import ast, base64, json, os, re, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from cxr_lab.masked import PLAIN, VIEWS
from cxr_lab.pipeline import notebook_parameters
from cxr_lab.runs import read_json, read_metrics, read_predictions
from cxr_lab.scores import score

REPO = Path(__file__).resolve().parent.parent
LESSONS = sorted((REPO/'nbs').glob('[0-9][0-9]_*.ipynb'))
NOTEBOOKS = sorted(p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LAB = sorted(p.stem for p in (REPO/'nbs'/'lab').glob('*.ipynb'))
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in LESSONS}
FOUNDATION = ['00_data', '01_explore', '02_model', '03_train', '04_augment', '05_compare']
STUDY = [p.stem for p in LESSONS]

def named(paths): return pytest.mark.parametrize('path', paths, ids=lambda p: p.stem)
def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


# Imports

def imported(source):
    "Modules of cxr_lab that a source imports, with and without the dot."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or '').split('.')[0] == 'cxr_lab'):
            inside = (node.module or '').removeprefix('cxr_lab').strip('.')
            found |= {inside.split('.')[0]} if inside else {a.name for a in node.names}
        if isinstance(node, ast.Import): found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('cxr_lab.')}
    return found - {'__version__'}

def test_imports_are_read_right():
    assert imported('from .data import x\nfrom . import model, __version__\nimport cxr_lab.train as t\nfrom cxr_lab.runs import y\nfrom cxr_lab import phantom\nimport os') == {'data', 'model', 'train', 'runs', 'phantom'}

@named(LESSONS)
def test_cells_import_only_what_came_before(path):
    source = '\n'.join(c.source for c in code_cells(path) if not re.search(r'^\s*[%!]', c.source, re.M))
    for other in imported(source): assert other in LAB or NUMBER[other] < int(path.stem[:2]), f'{path.stem} imports {other}'

def test_everything_imports_without_the_development_tools_and_without_tensorflow():
    code = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('nbdev', 'fastcore', 'execnb', 'pytest', 'smalldocs'): raise ModuleNotFoundError(f'blocked: {name}', name=name)
sys.meta_path.insert(0, Block())
try: import fastcore
except ModuleNotFoundError: pass
else: raise SystemExit('the block does not block')
import cxr_lab
names = [m.name for m in pkgutil.iter_modules(cxr_lab.__path__) if not m.name.startswith('_')]
for name in names: importlib.import_module(f'cxr_lab.{name}')
print(*[m for m in ('tensorflow', 'keras') if m in sys.modules], *names)
"""
    done = subprocess.run([sys.executable, '-W', 'error::SyntaxWarning', '-c', code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(p.stem for p in (REPO/'cxr_lab').glob('*.py') if not p.stem.startswith('_')) and done.stderr == ''


# Form

@named(LESSONS)
def test_title_and_subtitle(path):
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == 'markdown' and re.match(r'# \S.*\n\n?> \S[^\n]*\n?(\n|$)', first.source.strip())

@named(LESSONS)
def test_one_parameter_cell_of_a_few_literals(path):
    cells = [c for c in code_cells(path) if 'parameters' in c.metadata.get('tags', [])]
    assert len(cells) == 1
    lines = cells[0].source.strip().splitlines()
    assert 1 <= len(lines) <= 1 + 8 and lines[0].startswith("run_dir: str = 'runs/")
    for line in lines:
        assert re.fullmatch(r'\w+: (str|int|float|bool) = .+?  # .+', re.sub(r' +#', '  #', line)), line
        node, = ast.parse(line).body
        value = ast.literal_eval(node.value)
        assert type(value).__name__ == node.annotation.id, line
        assert not (isinstance(value, str) and Path(value).is_absolute()), line
    assert {k.name for k in notebook_parameters(path).values() if k.help} == {line.split(':')[0] for line in lines}

@named(LESSONS)
def test_every_parameter_is_used_and_noted_in_the_run(path):
    names = list(notebook_parameters(path))
    rest = [c.source for c in code_cells(path) if 'parameters' not in c.metadata.get('tags', [])]
    step = next(s for s in rest if 'Step(run_dir' in s)
    for name in names: assert re.search(rf'\b{name}\b', step), f'{name} is not handed to Step'

ABSOLUTE = re.compile(r'(?<![\w.:/<-])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|private|scratch)/|[A-Z]:\\\\?(?:Users|Temp)')

def texts(output):
    if output.output_type == 'stream': yield output.text
    for kind, value in output.get('data', {}).items():
        if not kind.startswith('image/') or kind == 'image/svg+xml': yield value if isinstance(value, str) else json.dumps(value)

@named(NOTEBOOKS)
def test_what_is_committed_is_fit_to_be_read(path):
    assert path.stat().st_size < 3_000_000
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    for cell in nb.cells:
        assert not ABSOLUTE.search(cell.source), cell.source[:200]
        for output in cell.get('outputs', []):
            assert output.output_type != 'error', output.ename
            assert not (output.output_type == 'stream' and output.name == 'stderr'), output.text[:200]
            for text in texts(output):
                assert not ABSOLUTE.search(text), ABSOLUTE.search(text)[0]
            png = output.get('data', {}).get('image/png')
            if png: assert base64.b64decode(png).startswith(b'\x89PNG')

def options(cell):
    "What `#| key: value` lines at the top of a cell say, as Quarto reads them."
    lines = re.match(r'(#\|.*\n?)*', cell.source)[0].splitlines()
    return yaml.safe_load('\n'.join(line.removeprefix('#|') for line in lines if ':' in line)) or {}

@named(LESSONS)
def test_what_a_committed_lesson_says_holds(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            for text in texts(output): assert 'does not hold here' not in text, text

@named(NOTEBOOKS)
def test_every_picture_is_described(path):
    for cell in code_cells(path):
        if not any(kind.startswith('image/') for output in cell.outputs for kind in output.get('data', {})): continue
        alt = options(cell).get('fig-alt')
        assert isinstance(alt, str) and 40 <= len(alt) <= 400, f'{path.stem}: `#| fig-alt: "..."` is missing or too short at the top of the cell that draws\n{cell.source[-300:]}'
        assert alt[0].isupper() and alt.endswith('.') and alt != options(cell).get('fig-cap'), alt
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == 'markdown': assert not re.search(r'!\[\s*\]\(|<img(?![^>]*\salt="[^"]+")', cell.source), cell.source[:200]

@named(sorted((REPO/'cxr_lab').glob('*.py')))
def test_modules_are_what_the_notebooks_export(path):
    source = path.read_text()
    if path.stem.startswith('_'): return
    assert 'AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/' in source
    notebook = REPO/'nbs'/re.search(r'File to edit: \.\./nbs/(\S+\.ipynb)', source)[1]
    exported = [re.sub(r'\A(#\|.*\n)+', '', c.source).strip() for c in code_cells(notebook) if re.match(r'#\|\s*export', c.source)]
    squeezed = re.sub(r'\s+', '', re.sub(r'(?m)^# %%.*$', '', source)).replace('fromcxr_lab.', 'from.')
    for cell in exported:
        if cell.startswith(('import ', 'from ')): continue  # the export makes imports relative
        assert re.sub(r'\s+', '', cell).replace('fromcxr_lab.', 'from.') in squeezed, f'run nbdev_export: {cell[:100]}'


# The study from end to end

def cli(*args, cwd, **env):
    "`cxr-lab` in a process of its own."
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))
    return subprocess.run([sys.executable, '-c', 'from cxr_lab.cli import main; main()', *args], cwd=cwd, env=os.environ | {'PYTHONPATH': path} | env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

def check_run(run, kind, seeds, lessons, ablation=True):
    "Everything that a complete run of some lessons holds, and that it agrees with itself."
    results, info = read_json(run/'results.json'), read_json(run/'run.json')
    assert info['dataset']['kind'] == kind and set(info['parameters']) == set(lessons)
    for name in lessons:
        assert (run/name/'metrics.json').is_file() and (run/name/'status.json').is_file() and not list((run/name).glob('*.partial.ipynb')), name
        read_metrics(run/name/'metrics.json')
        nb = nbformat.read(run/name/f'{name}.ipynb', 4)
        for cell in nb.cells:
            for output in cell.get('outputs', []):
                assert output.output_type != 'error' and not (output.output_type == 'stream' and output.name == 'stderr'), f'{name}: {output.get("text", "")[:300]}'
                for text in texts(output): assert not ABSOLUTE.search(text), f'{name}: {text[:300]}'
    images = read_metrics(run/'00_data'/'metrics.json')
    experiments = {'baseline': '03_train', 'augmented': '04_augment'} | ({'geometric': '04_augment/geometric', 'photometric': '04_augment/photometric'} if ablation else {})
    if '08_masked' in lessons: experiments |= {name: f'08_masked/{view}' for view, name in (VIEWS | PLAIN).items()}
    rows = {(r['experiment'], r['seed'], r['threshold_rule']): r for r in results['rows']}
    assert set(rows) == {(e, s, rule) for e in experiments for s in seeds for rule in ('0.5', 'validation')} and len(rows) == len(results['rows'])
    paths = None
    for experiment, place in experiments.items():
        for s in seeds:
            folder = run/place/f'seed_{s}'
            p, m = read_predictions(folder/'predictions.csv'), read_metrics(folder/'metrics.json')
            assert len(p) == images['n_images'] and (paths is None or list(p.path) == paths) and p.groupby('patient').split.nunique().max() == 1
            paths = list(p.path)
            t = p[p.split == 'test']
            assert len(t) == m['n'] == images['n_test'] and (folder/'model.safetensors').is_file() and (folder/'log.csv').is_file() and not list(folder.rglob('*.ckpt'))
            for rule, threshold in (('0.5', .5), ('validation', m['threshold'])):
                row = rows[experiment, s, rule]
                assert row['threshold'] == threshold and row['n'] == len(t)
                for k, v in score(t.label, t.probability, threshold).items(): assert row[k] is v is None or row[k] == pytest.approx(v, abs=1e-6), (experiment, s, rule, k)
    for notebook in ('03_train', '04_augment'): assert (run/notebook/'predictions.csv').read_bytes() == (run/notebook/f'seed_{seeds[0]}'/'predictions.csv').read_bytes()
    chests = pd.read_csv(run/'01_explore'/'proportions.csv')
    assert list(chests) == ['path', 'proportion', 'width', 'height'] and list(chests.path) == paths
    assert np.allclose(chests.proportion, chests.width / chests.height) and chests[['width', 'height']].max().max() <= 1
    measured, probed = (read_metrics(run/n/'metrics.json') for n in ('01_explore', '03_train'))
    assert {f'proportion_auroc_{s}' for s in ('train', 'validation', 'test')} <= set(measured)
    assert probed['proportion_unchanged_auroc'] == pytest.approx(np.mean([rows['baseline', s, '0.5']['auroc'] for s in seeds]), abs=.02)
    assert {'stretched_80_specificity', 'stretched_125_recall', 'proportion_own_class_auroc', 'gap_auroc_one_box'} <= set(probed)
    compare = read_metrics(run/'05_compare'/'metrics.json')
    for k in ('f1', 'accuracy', 'auroc'):
        for letter, experiment in (('a', 'baseline'), ('b', 'augmented')): assert compare[f'{k}_{letter}'] == pytest.approx(np.mean([rows[experiment, s, '0.5'][k] for s in seeds]), abs=1e-6)
    return results

def check_study(folder, *options):
    "`cxr-lab run --quick` in an empty folder: complete, consistent, silent; and nothing runs again with --resume."
    done = cli('run', '--quick', *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.sub(rf'\d+_\w+ \(\d+/{len(STUDY)}\): done in \d+ s\n', '', done.stderr) == '', done.stderr
    run = folder/'runs'/'default'
    results = check_run(run, 'phantom', [0], STUDY, ablation=(run/'04_augment'/'geometric').is_dir())
    assert 'Computed on generated phantoms, not on patients.' in done.stdout and results['provenance']['data'] == 'phantom' and results['provenance']['outdated'] == []
    assert not list(folder.rglob('lightning_logs')) and sorted(p.name for p in folder.iterdir()) == ['runs']
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob('*') if p.is_file() and p.parent != run}
    again = cli('run', '--quick', *options, '--resume', cwd=folder)
    said = [line.split(': ')[1] for line in again.stderr.splitlines() if f'/{len(STUDY)})' in line]
    assert again.returncode == 0 and len(said) == len(STUDY), again.stderr
    assert all(words.startswith('complete, kept from ') for words in said), again.stderr
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob('*') if p.is_file() and p.parent != run}
    table = cli('table', 'runs/default', cwd=folder)
    assert table.returncode == 0 and 'augmented' in table.stdout and 'baseline' in table.stdout

SMALL = dict(  # as little as the lessons accept: what is asked here is whether a run agrees with itself
    phantoms=96, image_size=64, epochs=1, n_boot=50, images=12, steps=4,
    shown=1500, perplexity=10, thumbnail=16)

@pytest.mark.integration
def test_a_small_study_on_phantoms(tmp_path):
    check_study(tmp_path, *(part for k, v in SMALL.items() for part in ('-p', f'{k}={v}')))

@pytest.mark.slow
@pytest.mark.integration
def test_the_quick_study_on_phantoms(tmp_path): check_study(tmp_path)

@pytest.mark.slow
def test_forty_one_training_images_are_enough(tmp_path):
    "They do not fill 32 batches: the smallest batches are taken, as the comment of `batch_size` says."
    sizes = dict(phantoms=48, image_size=64, epochs=1, seeds=1)
    done = cli('run', '00', '01', '03', *(part for k, v in sizes.items() for part in ('-p', f'{k}={v}')), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path/'runs'/'default'
    assert read_metrics(run/'00_data'/'metrics.json')['n_train'] == 41
    assert read_json(run/'03_train'/'seed_0'/'recipe.json')['batch_size'] == 8

@pytest.mark.slow
@pytest.mark.integration
def test_the_study_on_real_images(tmp_path, real_data):
    "One seed of the whole: better than the course with augmentation (accuracy .8542, F1 .8918), and AUROC above .95."
    done = cli('run', *FOUNDATION, '--data', 'kermany', '-p', 'seeds=1', cwd=tmp_path, CXR_LAB_DATA=str(real_data))
    assert done.returncode == 0, done.stderr
    rows = check_run(tmp_path/'runs'/'default', 'kermany', [0], FOUNDATION)['rows']
    row = next(r for r in rows if r['experiment'] == 'augmented' and r['threshold_rule'] == '0.5')
    assert row['n'] == 624 and row['accuracy'] > .8542 and row['f1'] > .8918 and row['auroc'] > .95
