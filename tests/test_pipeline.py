"Running notebooks into a run folder: checks before the start, failures that say where, resuming."
import io, json, os, pickle, re, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from filelock import FileLock

from cxr_lab import kernels, pipeline
from cxr_lab.pipeline import NotebookFailed, RunInUse, UsageError, check_parameters, lessons, notebook_parameters, notebooks_dir, run_pipeline, select
from cxr_lab.runs import read_json, versions, write_json

RUN_DIR = "run_dir: str = 'runs/default'  # run folder"


def write_notebook(name, *cells):
    "The first cell is the parameter cell."
    code = [nbformat.v4.new_code_cell(c, metadata={'tags': ['parameters']} if i == 0 else {}) for i, c in enumerate(cells)]
    Path('nbs').mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Title'), *code]), f'nbs/{name}.ipynb')

LOG = "from pathlib import Path\nlog = Path('log.txt')\n"  # which notebooks ran, and with what

@pytest.fixture
def nbs(tmp_path, monkeypatch):
    "Two notebooks that note in log.txt that they ran."
    monkeypatch.chdir(tmp_path)
    write_notebook('00_data', f"{RUN_DIR}\ndata: str = 'phantom'  # what\nseed: int = 0", LOG + "log.open('a').write(f'data {seed}\\n')")
    write_notebook('01_train', f'{RUN_DIR}\nlr: float = 1e-3  # step\nepochs: int = 8\naugment: bool = False\nseed: int = 0',
                   LOG + "log.open('a').write(f'train {lr} {epochs} {seed}\\n')")
    return tmp_path/'nbs'

def ran():
    "What ran since the last call."
    path = Path('log.txt')
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines

def run(**kwargs): return run_pipeline(**{'nbs': 'nbs', 'run_dir': 'runs/r'} | kwargs)

def files(): return sorted(p.relative_to('runs/r').as_posix() for p in Path('runs/r').rglob('*') if p.is_file() and not p.name.startswith('.'))


# Before anything starts

def test_notebooks_by_any_name(nbs):
    for name in ['01_train', '01', '1', 'train', 'nbs/01_train.ipynb']: assert [p.stem for p in select([name], nbs)] == ['01_train']
    assert [p.stem for p in select(['train', '00', '01'], nbs)] == ['00_data', '01_train'] == [p.stem for p in select(None, nbs)] == [p.stem for p in select([], nbs)]
    for name in ['tain', '02', '', '0']:
        if name != '0':
            with pytest.raises(UsageError, match='unknown notebook.*known: 00_data, 01_train'): select([name], nbs)
    with pytest.raises(UsageError, match='no notebooks'): lessons(nbs/'none')

def test_the_package_finds_its_lessons():
    assert notebooks_dir().name in ('nbs', 'notebooks')

def test_knobs(nbs):
    write_notebook('02_odd', "a: int = -1  # a = b, with an equals sign\nb = [1,\n     2]\nc: 'float' = .5\nd: str | None = None  # maybe\n# a comment\ne: str = 'x=#'")
    knobs = notebook_parameters('nbs/02_odd.ipynb')
    assert {k.name: (k.type, k.default) for k in knobs.values()} == {
        'a': ('int', -1), 'b': ('list', [1, 2]), 'c': ('float', .5), 'd': ('str | None', None), 'e': ('str', 'x=#')}
    assert notebook_parameters(nbs/'01_train.ipynb')['lr'].help == 'step'
    write_notebook('03_bad', 'a: int = 1 + n')
    with pytest.raises(ValueError, match='03_bad.ipynb: the parameter cell holds'): notebook_parameters('nbs/03_bad.ipynb')

def planned(nbs, data=None, params=None, **more):
    said = pipeline.typed_parameters(lessons(nbs), pipeline.with_data(params, data))
    return pipeline.plan_overrides(lessons(nbs), said, **more)

@pytest.mark.parametrize('name,value,expected', [
    ('lr', '1e-3', 1e-3), ('lr', '3', 3.), ('lr', 3, 3.), ('lr', np.float32(.5), .5), ('epochs', '12', 12), ('epochs', np.int64(2), 2), ('epochs', ' 7 ', 7),
    ('augment', 'true', True), ('augment', 'False', False), ('augment', np.bool_(True), True), ('data', 'kermany', 'kermany'), ('data', Path('nbs'), 'nbs')])
def test_values_are_typed(nbs, name, value, expected):
    found = [o[name] for o in check_parameters(lessons(nbs), {name: value}).values() if name in o]
    assert found == [expected] and type(found[0]) is type(expected)

@pytest.mark.parametrize('name,value', [('lr', 'fast'), ('lr', 'nan'), ('lr', float('inf')), ('lr', True), ('lr', ''), ('epochs', '2.0'), ('epochs', 2.0), ('epochs', True), ('epochs', None),
                                        ('augment', '1'), ('augment', 1), ('augment', 'yes'), ('data', 5), ('epochs', [1])])
def test_wrong_types_are_refused(nbs, name, value):
    with pytest.raises(UsageError, match=f'0._.*: {name}: expected (int|float|bool|str), found'): run(params={name: value})
    assert not Path('runs').exists() and not ran()

def test_numbers_out_of_range_are_refused(nbs):
    write_notebook('02_more', f'{RUN_DIR}\nsteps: int = 8  # how many (>= 1)')
    assert check_parameters(lessons(nbs), {'steps': '1'})['02_more'] == {'steps': 1}
    for value in ('0', -1):
        with pytest.raises(UsageError, match=f'02_more: steps: expected int >= 1, found {value!r}'): run(params={'steps': value})
    assert not Path('runs').exists()

def test_unknown_names_list_the_known_ones_and_nothing_starts(nbs):
    for key in ['epoch', '01_train.data', '00.epochs', 'nbs']:
        with pytest.raises(UsageError, match='unknown parameter') as e: run(params={'seed': 1, key: 3})
        assert 'lr: float = 0.001, epochs: int = 8, augment: bool = False, seed: int = 0' in str(e.value) and 'run_dir' not in str(e.value)
    with pytest.raises(UsageError, match="did you mean 'epochs'"): run(params={'epoch': 3})
    with pytest.raises(UsageError, match='unknown notebook'): run(params={'07.epochs': 3})
    with pytest.raises(UsageError, match='--run-dir'): run(params={'run_dir': 'x'})
    with pytest.raises(UsageError, match='unknown parameter'): run(notebooks=['01'], params={'data': 'kermany'})
    assert not Path('runs').exists() and not ran()

def test_addressed_beats_plain_in_any_order(nbs):
    for params in [{'seed': 1, 'train.seed': 2}, {'train.seed': 2, 'seed': 1}]:
        assert check_parameters(lessons(nbs), params) == {'00_data': {'seed': 1}, '01_train': {'seed': 2}}

def test_quick_never_beats_the_user(nbs, monkeypatch):
    monkeypatch.setattr(pipeline, 'QUICK', {'epochs': 3, 'seed': 9, 'elsewhere': 1})
    assert planned(nbs, params={'seed': '1'}, quick=True) == {'00_data': {'seed': 1}, '01_train': {'seed': 1, 'epochs': 3}}
    assert planned(nbs) == {'00_data': {}, '01_train': {}}

def test_real_images_take_their_own_study(nbs, monkeypatch):
    write_notebook('00_data', f"{RUN_DIR}\ndata: str = 'phantom'\nimage_size: int = 64\nphantoms: int = 600")
    write_notebook('01_train', f'{RUN_DIR}\nepochs: int = 24\nseeds: int = 3')
    monkeypatch.setattr(pipeline, 'QUICK', {'epochs': 2})
    assert planned(nbs) == planned(nbs, data='phantom', quick=False) | {'00_data': {}} == {'00_data': {}, '01_train': {}}
    real = {'image_size': 128}, {'epochs': 8, 'seeds': 5}
    for data in ('kermany', 'pneumoniamnist', str(nbs)):
        assert planned(nbs, data=data) == {'00_data': real[0] | {'data': data}, '01_train': real[1]}
        assert planned(nbs, params={'00.data': data})['01_train'] == real[1]
    assert planned(nbs, data='kermany', quick=True)['01_train'] == {'epochs': 2, 'seeds': 5}
    assert planned(nbs, data='kermany', quick=True, params={'epochs': 30, 'image_size': 32}) == {
        '00_data': {'data': 'kermany', 'image_size': 32}, '01_train': {'epochs': 30, 'seeds': 5}}
    before = {'00_data': {'data': 'kermany'}, '01_train': {'seeds': 4}}
    assert planned(nbs, before=before)['01_train'] == {'epochs': 8, 'seeds': 4}
    assert planned(nbs, before=before, data='phantom')['01_train'] == {'seeds': 4}
    write_notebook('01_train', f'{RUN_DIR}\nepochs: int = 12\nseeds: int = 3')
    assert planned(nbs, data='kermany')['01_train'] == {'seeds': 5}, 'what somebody has changed is what runs'
    write_notebook('00_data', f"{RUN_DIR}\ndata: str = 'kermany'\nimage_size: int = 64")
    assert planned(nbs) == {'00_data': {'image_size': 128}, '01_train': {'seeds': 5}}
    assert planned(nbs, data='phantom')['01_train'] == {}

def test_a_later_lesson_knows_what_the_folder_was_started_on(nbs, capfd):
    write_notebook('00_data', f"{RUN_DIR}\ndata: str = 'phantom'\nimage_size: int = 64", "from cxr_lab.runs import Step\nStep(run_dir, '00_data', dict(data=data))")
    write_notebook('01_train', f'{RUN_DIR}\nepochs: int = 24\nseeds: int = 3', LOG + "log.open('a').write(f'train {epochs} {seeds}\\n')")
    for k in (1, 2, 3):
        if k == 2: run(notebooks=['01'], data=None)
        else: run(data='nbs' if k == 3 else None)
        assert ran() == ['train 24 3' if k < 3 else 'train 8 5']
        assert ('data=' in capfd.readouterr().err) == (k == 3)
    run(notebooks=['01']); assert ran() == ['train 8 5']
    assert capfd.readouterr().err.startswith('data=nbs: epochs=8, seeds=5\n')
    run(notebooks=['01'], quick=True, params={'seeds': 2}); assert ran() == ['train 4 2']
    assert capfd.readouterr().err.startswith('data=nbs: epochs=4, seeds=2\n')
    run(resume=True, notebooks=['00']); assert ran() == []
    assert 'resuming with image_size=128, data=nbs\ndata=nbs: image_size=128\n' in capfd.readouterr().err
    run(notebooks=['00', '01']); assert ran() == ['train 24 3'], 'a run that begins again begins with phantoms'

def test_the_lessons_say_what_the_studies_take():
    "The defaults are the study on phantoms, and the comments name the one on real images."
    phantom, real = (dict(pipeline.STUDIES[k]) for k in ('phantom', 'real'))
    assert set(phantom) == set(real)
    for path in lessons():
        for name, knob in notebook_parameters(path).items():
            said = re.search(r'real images: (\S+)$', knob.help)
            assert bool(said) == (name in real), (path.stem, name)
            if said: assert knob.default == phantom.pop(name) and knob.check(said[1]) == real.pop(name)
    assert not phantom and not real

def test_data_is_checked(nbs):
    for data in ['phantom', 'kermany', 'pneumoniamnist', 'nbs', nbs]: assert planned(nbs, data=data)['00_data']['data'] == str(data)
    for bad in [dict(data='kermani'), dict(params={'data': 'no/such'}), dict(data='')]:
        with pytest.raises(UsageError, match='no data set and no folder'): run(**bad)
    with pytest.raises(UsageError, match='given twice'): run(data='phantom', params={'data': 'kermany'})
    assert not Path('runs').exists()

def test_only_folders_of_a_run_are_emptied(nbs):
    Path('runs/r/00_data').mkdir(parents=True); Path('runs/r/00_data/thesis.txt').touch()
    with pytest.raises(UsageError, match='not made by a run'): run()
    assert Path('runs/r/00_data/thesis.txt').exists() and not ran()
    Path('file').touch()
    with pytest.raises(UsageError, match='is a file'): run(run_dir='file')

def test_a_second_pipeline_is_refused(nbs):
    Path('runs/r').mkdir(parents=True)
    with FileLock('runs/r/.pipeline.lock'), pytest.raises(RunInUse, match="at work in 'runs/r'"): run()
    assert not ran() and files() == []


# Running

def test_success_unicode_environment_and_layout(nbs, monkeypatch, capfd):
    broken = Path('jupyter/kernels/python3')  # another environment's kernel under the usual name
    broken.mkdir(parents=True)
    (broken/'kernel.json').write_text(json.dumps({'argv': ['false'], 'display_name': 'x', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(Path('jupyter').resolve()))
    write_notebook('00_data', f"{RUN_DIR}\nname: str = 'x'", "import json, os, sys, cxr_lab\nfrom pathlib import Path\nfrom tqdm import tqdm\nfrom cxr_lab.runs import progress\n"
                   "for i in progress(range(3), 'x'): pass\n"
                   "size = Path('seen.json').write_text(json.dumps(dict(name=name, run_dir=run_dir, exe=sys.executable, cwd=os.getcwd(), progress=os.environ['CXR_LAB_PROGRESS'], lab=cxr_lab.__file__)))")
    import cxr_lab
    name = 'a=b, "ü" {x} \\ \'肺\n'
    assert run(notebooks='data', run_dir='runs/ü {r}', params={'name': name}) == Path('runs/ü {r}')
    seen = json.loads(Path('seen.json').read_text())
    assert seen == dict(name=name, run_dir='runs/ü {r}', exe=sys.executable, cwd=os.getcwd(), progress='0', lab=cxr_lab.__file__)
    step = Path('runs/ü {r}/00_data')
    assert sorted(p.name for p in step.iterdir()) == ['00_data.html', '00_data.ipynb', 'status.json']
    status = read_json(step/'status.json')
    assert status['parameters'] == {'name': name} and status['upstream'] == {} and status['seconds'] > 0
    cells = nbformat.read(step/'00_data.ipynb', 4).cells
    assert [c.execution_count for c in cells if c.cell_type == 'code'] == [1, 2, 3] and not cells[-1].outputs
    assert read_json('runs/ü {r}/results.json')['rows'] == []
    out = capfd.readouterr()
    assert out.out == '' and '00_data (1/1): done in' in out.err and 'WARNING' not in out.err and 'apermill' not in out.err

def test_resume(nbs, capfd):
    "One story, because every kernel costs seconds: skip, then each reason to run again."
    run(params={'epochs': 2}); assert ran() == ['data 0', 'train 0.001 2 0']
    run(resume=True); assert ran() == []
    assert '00_data (1/2): complete' in capfd.readouterr().err
    run(resume=True, params={'lr': '0.1'}); assert ran() == ['train 0.1 2 0']  # epochs are remembered
    assert 'other lr' in capfd.readouterr().err
    nb = nbformat.read('nbs/01_train.ipynb', 4)
    nb.cells[0].source = '# Another title'
    nb.cells[-1].source = '#| fig-alt: "how a page describes it"\n' + nb.cells[-1].source
    nbformat.write(nb, 'nbs/01_train.ipynb')
    run(resume=True); assert ran() == []  # prose does not matter, nor how a page shows a cell
    nb.cells[-1].source += '\n1 + 1'
    nbformat.write(nb, 'nbs/01_train.ipynb')
    run(resume=True); assert ran() == ['train 0.1 2 0']
    assert 'its code changed' in capfd.readouterr().err
    run(notebooks=['00']); assert ran() == ['data 0']
    run(resume=True); assert ran() == ['train 0.1 2 0']
    assert '00_data ran again' in capfd.readouterr().err
    Path('runs/r/01_train/old.txt').touch()
    run(notebooks=['01']); assert ran() == ['train 0.001 8 0'] and not Path('runs/r/01_train/old.txt').exists()  # no resume: from scratch
    assert files() == ['00_data/00_data.html', '00_data/00_data.ipynb', '00_data/status.json', '01_train/01_train.html',
                       '01_train/01_train.ipynb', '01_train/status.json', 'index.html', 'pipeline.json', 'results.json']

def why(path, run='runs/r'): return pipeline._why_run(Path(run), path.stem, pipeline.step_key(path, {}))

def complete(path, run='runs/r', **status):
    "As if a notebook had been executed."
    write_json(Path(run)/path.stem/'status.json', {'id': 'x', 'upstream': {}, 'seconds': 1., **pipeline.step_key(path, {}), 'versions': versions()} | status)

def test_other_versions_are_named_and_run_nothing(nbs, capfd):
    run(notebooks=['00'])
    capfd.readouterr()
    run(notebooks=['00'], resume=True)
    assert re.fullmatch(r'00_data \(1/1\): complete, kept from \d{4}-\d\d-\d\d \d\d:\d\d: same images, parameters and code\n', capfd.readouterr().err)
    complete(nbs/'00_data.ipynb', versions=versions() | {'torch': '1.0'})
    ran()
    run(notebooks=['00'], resume=True)
    assert f'(made with torch 1.0, now {versions()["torch"]})' in capfd.readouterr().err and ran() == []

def test_what_an_older_pipeline_completed_runs_again(nbs):
    complete(nbs/'01_train.ipynb', code='0f3a')
    assert why(nbs/'01_train.ipynb') == 'what code made it was not noted'

def test_a_definition_that_a_lesson_reaches_runs_it_again(tmp_path, monkeypatch):
    "Half as many channels in lesson 02: its own cells, and those lessons that use its network, are other code."
    monkeypatch.chdir(tmp_path)
    from cxr_lab.model import SmallCNN
    paths = {p.stem: p for p in lessons()}
    for stem in ('01_explore', '03_train', '04_augment', '09_tsne'): complete(paths[stem])
    assert [why(paths[s]) for s in ('01_explore', '03_train', '04_augment', '09_tsne')] == ['']*4
    original = SmallCNN.__init__
    def narrow(self, widths=(8, 12, 24, 64)): original(self, widths)
    monkeypatch.setattr(SmallCNN, '__init__', narrow)
    for stem in ('03_train', '04_augment', '09_tsne'): assert re.match('its code changed: .*(SmallCNN|narrow)', why(paths[stem])), stem
    assert why(paths['01_explore']) == ''

def test_no_lesson_holds_what_cannot_be_told():
    for path in lessons():
        code, _ = pipeline.notebook_code(path)
        assert len(code) > 50 and not [k for k, v in code.items() if 'cannot tell' in v], path.stem

def test_code_that_is_not_python_is_left_to_its_execution(nbs):
    write_notebook('02_broken', RUN_DIR, 'def (')
    assert 'not valid Python' in pipeline.step_key(nbs/'02_broken.ipynb', {})['code']['cells']

TRAINED = ("import json, pathlib, sys\nfrom cxr_lab.kept import is_kept, take_back\nstep = pathlib.Path(run_dir)/'02_trains'\ntake_back(step, 'seed_0')\n"
           "if not is_kept(step/'seed_0/recipe.json'):\n    (step/'seed_0').mkdir(exist_ok=True); (step/'seed_0/recipe.json').write_text('{}'); open('log.txt', 'a').write('trained\\n')\n")

def test_trainings_outlive_other_code_and_a_fresh_start_makes_all_again(nbs, capfd):
    "One story, because every kernel costs seconds."
    write_notebook('02_trains', RUN_DIR, TRAINED, 'title = 1')
    run(notebooks=['02']); assert ran() == ['trained']
    step = Path('runs/r/02_trains')
    (step/'old.png').touch()
    (step/'seed_9').mkdir(); (step/'seed_9/recipe.json').touch()
    write_notebook('02_trains', RUN_DIR, TRAINED, 'title = 2')
    run(notebooks=['02'], resume=True); assert ran() == []  # executed again, and what it had trained is kept
    assert 'its code changed: cells' in capfd.readouterr().err
    assert sorted(p.name for p in step.iterdir()) == ['02_trains.html', '02_trains.ipynb', 'seed_0', 'status.json'], 'and nothing that this execution did not ask for'
    run(notebooks=['02']); assert ran() == []
    for file in (step/'seed_0/recipe.json', step/'status.json'): os.utime(file, (1e9, 1e9))
    write_notebook('02_trains', RUN_DIR, TRAINED, 'raise ValueError')
    with pytest.raises(NotebookFailed): run(notebooks=['02'], fresh=True)
    assert ran() == ['trained']
    write_notebook('02_trains', RUN_DIR, TRAINED, 'title = 2')
    run(notebooks=['02'], resume=True); assert ran() == [], 'what the fresh run has made itself is kept'
    os.utime(step/'status.json', (1e9, 1e9)); os.utime(step/'seed_0/recipe.json', (1e9, 1e9))
    run(notebooks=['02'], resume=True); assert ran() == ['trained'], 'an interrupted --fresh is resumed as one'
    assert 'again, as --fresh says' in capfd.readouterr().err and 'CXR_LAB_FRESH' not in os.environ

def test_failure_says_where_and_resume_continues_there(nbs):
    write_notebook('02_fails', f"{RUN_DIR}\nepochs: int = 8", "from pathlib import Path\nstep = Path(run_dir)/'02_fails'", '# why\n\nraise_on = 8',
                   "(step/'checkpoint').open('a').write('x')\nif not Path('mended').exists(): raise ValueError('no ümlaut')", LOG + "log.open('a').write('end\\n')")
    write_notebook('03_never', RUN_DIR, LOG + "log.open('a').write('never\\n')")
    with pytest.raises(NotebookFailed) as e: run(notebooks=['02', '03'])
    f = pickle.loads(pickle.dumps(e.value))
    assert (f.notebook, f.cell, f.line, f.error) == ('02_fails', 5, "(step/'checkpoint').open('a').write('x')", 'ValueError: no ümlaut')
    assert f.partial == 'runs/r/02_fails/02_fails.partial.ipynb' and Path(f.partial).exists()
    assert 'failed in cell [5]' in str(f) and f.partial in str(f) and ran() == []
    assert files() == ['02_fails/02_fails.partial.ipynb', '02_fails/checkpoint', '02_fails/started.json', 'index.html', 'pipeline.json']
    Path('mended').touch()
    run(notebooks=['02'], resume=True)
    assert ran() == ['end'] and Path('runs/r/02_fails/checkpoint').read_text() == 'xx'  # the folder was kept
    assert files() == ['02_fails/02_fails.html', '02_fails/02_fails.ipynb', '02_fails/checkpoint', '02_fails/status.json',
                       'index.html', 'pipeline.json', 'results.json']

def test_a_cell_is_named_by_its_first_line_of_code_or_the_heading_above(nbs):
    "Not by options of a cell, nor by a comment."
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    def stopped(*cells):
        for cell in cells:
            if cell.cell_type == 'code': cell.metadata['papermill'] = {'start_time': 'then'}
        nbformat.write(new_notebook(cells=list(cells)), 'partial.ipynb')
        return pipeline._last_started('partial.ipynb')
    first, second = new_markdown_cell('# T\n> s\n## First\ntext'), new_markdown_cell('no heading')
    assert stopped(first, new_code_cell('#| export\n#| fig-alt: "x"\n\n# why\n  f(1)\ng()')) == (1, 'f(1)')
    assert stopped(first, new_code_cell('a'), second, new_code_cell('#| hide\n# soon'), new_markdown_cell('## Later')) == (2, '## First')
    assert stopped(new_code_cell('# soon')) == (1, '')
    assert str(NotebookFailed('02_x', 1, '', 'E', 'p')).startswith('02_x failed in cell [1]\n')
    write_notebook('02_fails', RUN_DIR, '#| fig-alt: "x"\n# why\nraise ValueError(1)')
    with pytest.raises(NotebookFailed, match=r'in cell \[3\] `raise ValueError\(1\)`'): run(notebooks=['02'])

def test_an_incomplete_step_with_other_parameters_starts_from_scratch(nbs):
    key = pipeline.step_key(nbs/'01_train.ipynb', {'lr': .5})
    write_json('runs/r/01_train/started.json', key | {'upstream': {}})
    Path('runs/r/01_train/checkpoint').touch()
    run(notebooks=['01'], resume=True, params={'lr': .5})
    assert Path('runs/r/01_train/checkpoint').exists() and ran() == ['train 0.5 8 0']
    write_json('runs/r/01_train/started.json', key | {'upstream': {}}); Path('runs/r/01_train/status.json').unlink()
    run(notebooks=['01'], resume=True, params={'lr': .25})
    assert not Path('runs/r/01_train/checkpoint').exists() and ran() == ['train 0.25 8 0']

def test_a_dead_kernel_is_a_failure(nbs):
    write_notebook('02_dies', RUN_DIR, 'import os', 'os._exit(1)', 'print(1)')
    with pytest.raises(NotebookFailed, match=r'02_dies failed in cell \[4\] `os._exit\(1\)`\n  DeadKernelError'): run(notebooks=['02'])

def write_progress(folder, epoch, speed):
    state = {'share': epoch / 4, 'epoch': epoch, 'epochs': 4, 'images_per_second': speed}
    write_json(Path(folder)/'checkpoints'/'progress.json', state)

def test_how_far_trainings_are(tmp_path):
    assert pipeline._how_far(tmp_path, 0) == ''
    write_progress(tmp_path/'seed_0', 1, 400.2)
    assert pipeline._how_far(tmp_path, 0) == 'epoch 1/4, 400 images/s'
    write_progress(tmp_path/'rotated/seed_1', 3, 20.4)
    assert pipeline._how_far(tmp_path, 0) == 'epoch 3/4 1/4, 421 images/s'
    os.utime(tmp_path/'seed_0/checkpoints/progress.json', (1e9, 1e9))
    assert pipeline._how_far(tmp_path, 1.1e9) == 'epoch 3/4, 20 images/s', 'one that was interrupted before has not gone on yet'

TRAINS = '''import json, pathlib, time
folder = pathlib.Path(run_dir, '02_trains', 'seed_0', 'checkpoints')
folder.mkdir(parents=True)
state = dict(share=.25, epoch=1, epochs=4, images_per_second=321.)
for epoch in (1, 2):
    (folder/'new.json').write_text(json.dumps(state | dict(epoch=epoch)))
    (folder/'new.json').replace(folder/'progress.json')
    time.sleep(2.5)'''

def test_the_bar_moves_while_a_cell_trains(nbs, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self): return True
    write_notebook('02_trains', RUN_DIR, TRAINS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', terminal := Terminal())
        run(notebooks=['02'])
    said = terminal.getvalue()
    assert '02_trains (1/1): ' in said and 'done in' not in said
    assert 'epoch 1/4, 321 images/s' in said and 'epoch 2/4, 321 images/s' in said
    assert len(said.split('\r')) > 6, 'the clock goes on, too'
    Path('runs/r/02_trains/seed_0/checkpoints/progress.json').unlink()
    write_notebook('02_trains', RUN_DIR, TRAINS.replace('2.5', '.7'))
    run(notebooks=['02'])
    assert re.fullmatch(r'02_trains \(1/1\): done in \d+ s\n', capsys.readouterr().err), 'one line where nobody watches'

def test_leaving_early_is_a_failure(nbs):
    write_notebook('02_leaves', RUN_DIR, 'import sys\nsys.exit()', 'print(1)')
    with pytest.raises(NotebookFailed, match='before its end'): run(notebooks=['02'])

def test_linked_step_folder_is_unlinked_not_emptied(nbs):
    Path('shared').mkdir(); Path('shared/result').touch(); Path('shared/status.json').touch()
    Path('runs/r').mkdir(parents=True); Path('runs/r/00_data').symlink_to(Path('shared').resolve())
    run(notebooks=['00'])
    assert Path('shared/result').exists() and not Path('runs/r/00_data').is_symlink() and ran() == ['data 0']


# Warm kernels

EARLY = "import sys\nearly = 'pandas' in sys.modules\nimport pandas\n" + LOG + "log.open('a').write(f'{early}\\n')"

@pytest.mark.skipif(sys.platform != 'linux', reason='kernels are forked on Linux only')
def test_several_notebooks_share_their_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4): write_notebook(f'0{i}_n', f"{RUN_DIR}\nseed: int = 0", EARLY)
    def apart(**kwargs):  # this process may have loaded something else beforehand
        code = f"from cxr_lab.pipeline import run_pipeline; run_pipeline(**{dict(nbs='nbs', run_dir='runs/r') | kwargs})"
        env = os.environ | {'PYTHONPATH': str(Path(pipeline.__file__).parent.parent)}
        subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True)
    apart()
    assert ran() == ['False', 'True', 'True', 'True'], 'the first starts while the imports are loaded'
    apart(notebooks=['00', '01'])
    assert ran() == ['False', 'False'], 'two are too few'
    monkeypatch.setattr(pipeline, '_warm', lambda *a: pytest.fail('nothing is going to run'))
    run(resume=True, notebooks=['00', '01'])
    assert ran() == []

def test_notebooks_that_import_nothing_heavy_need_no_warm_kernel(nbs):
    write_notebook('02_more', RUN_DIR, 'import json')
    run()
    assert pipeline._warm([nbs/'00_data.ipynb', nbs/'02_more.ipynb'], nbs) is None

def test_modules_to_import_beforehand(nbs):
    write_notebook('02_more', RUN_DIR, 'import torch.nn as n, json, tensorflow\nfrom cxr_lab.data import fetch\nfrom . import x', '%matplotlib inline\nimport pandas', 'def (')
    assert kernels.warm_imports([nbs/'02_more.ipynb']) == ['cxr_lab.data', 'pandas', 'torch.nn']
