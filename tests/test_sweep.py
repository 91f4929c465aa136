"Sweeps: what is shared, what survives kill -9, a full disk and a second sweep, and tables against an independent computation."
import json, os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from cxr_lab import sweep as S
from cxr_lab.pipeline import RunInUse, UsageError, lessons, run_pipeline
from cxr_lab.runs import read_json, write_json
from cxr_lab.sweep import (SweepFailed, describe_plan, finish_point, needs, plan_sweep, point_name, read_config, read_values,
                           run_step, sweep, with_options)
from cxr_lab.tables import tidy_table

RUN_DIR = "run_dir: str = 'runs/default'  # run folder"

def write_notebook(name, *cells, folder='nbs'):
    "The first cell is the parameter cell."
    code = [nbformat.v4.new_code_cell(c, metadata={'tags': ['parameters']} if i == 0 else {}) for i, c in enumerate(cells)]
    Path(folder).mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Title'), *code]), f'{folder}/{name}.ipynb')

# Notebooks without imports that cost time; every execution leaves a line in log.txt, and a slow one can be waited for.
DATA = "import json, pathlib, time\nstep = pathlib.Path(run_dir)/'00_data'\nopen('log.txt', 'a').write(f'data {n}\\n')\n(step/'metrics.json').write_text(json.dumps({'n': n}))"
TRAIN = ("import json, pathlib, random, time\nopen('log.txt', 'a').write(f'train {lr} {seed}\\n')\nif lr > 1: raise ValueError('the loss <b>diverged</b>')\n"
         "n = json.loads((pathlib.Path(run_dir)/'00_data/metrics.json').read_text())['n']\ntime.sleep(float(pathlib.Path('pause').read_text()) if pathlib.Path('pause').exists() else 0)\n"
         "(pathlib.Path(run_dir)/'01_train/metrics.json').write_text(json.dumps({'score': lr + random.Random(seed).random() / n, 'seconds': time.time()}))")
JUDGE = ("import json, pathlib\nopen('log.txt', 'a').write('judge\\n')\nrun = pathlib.Path(run_dir)\nscore = json.loads((run/'01_train/metrics.json').read_text())['score']\n"
         "(run/'02_judge/metrics.json').write_text(json.dumps({'gain': score * factor}))")

@pytest.fixture
def nbs(tmp_path, monkeypatch):
    "Three notebooks, each of which names those that it reads."
    monkeypatch.chdir(tmp_path)
    write_notebook('00_data', f'{RUN_DIR}\nn: int = 10  # how many', DATA)
    write_notebook('01_train', f'{RUN_DIR}\nlr: float = 0.1\nseed: int = 0', TRAIN)
    write_notebook('02_judge', f'{RUN_DIR}\nfactor: float = 2.0', JUDGE)
    return tmp_path/'nbs'

def plan(**kwargs): return plan_sweep(**dict(nbs='nbs', grid={'lr': ['.1', '.2'], 'seed': ['0', '1']}, baseline={'lr': '.1'}) | kwargs)

def ran():
    "What ran since the last call."
    path = Path('log.txt')
    lines = sorted(path.read_text().splitlines()) if path.exists() else []
    path.unlink(missing_ok=True)
    return lines

def by_hand(p, out, keys=None):
    "A sweep's steps one after the other in this process."
    results = {}
    for key, node in p.nodes.items():
        if keys is None or node.stem in keys: results[key] = run_step(node, out, os.getcwd(), [], 0, *[results[k] for k in node.needs.values()])
    return results


# What is asked for

@pytest.mark.parametrize('text,values', [('1e-3,3e-4', ['1e-3', '3e-4']), ('0:3', ['0', '1', '2']), ('5:1:-2', ['5', '3']), ('-1:1', ['-1', '0']), ('0:2,7', ['0', '1', '7']), ('small, resnet18', ['small', 'resnet18']),
                                         ('"a,b",c', ['a,b', 'c']), ('', ['']), ('C:x', ['C:x']), ('1:2:', ['1:2:'])])
def test_values(text, values): assert read_values(text) == values

def test_config(tmp_path):
    path = tmp_path/'s.yaml'
    path.write_text('notebooks: [03]\nquick: true\nparams: {epochs: 1e1}\ngrid: {seed: 1:4, on: [true, null]}\npoints: [{lr: 1e-3}, {lr: 2}]')
    assert read_config(path) == dict(notebooks=['03'], quick=True, params={'epochs': '1e1'}, grid={'seed': ['1', '2', '3'], 'on': ['true', 'null']}, points=[{'lr': '1e-3'}, {'lr': '2'}])  # 1:4 is not 64
    for text, message in [('grids: {}', 'found grids'), ('- a', 'known keys'), ('params: {lr: [1]}', 'one value'), ('grid: {lr: {a: 1}}', 'is a list'), ('grid: {lr: [[1, 2]]}', 'one value'), ('points: {lr: 1}', 'points is a list'),
                          ('points: [3]', '`name: value` lines'), ('quick: yes', 'true or false'), ('a: [', 'not YAML'), ('params: !!python/object/apply:os.system [x]', '`name: value` lines')]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message): read_config(path)

def test_the_command_line_beats_the_file():
    config = dict(grid={'lr': ['1', '2']}, params={'epochs': '3'}, points=[{'model': 'small'}])
    assert with_options(config, {'lr': '5', 'epochs': '1,2'}) == config | dict(grid={'epochs': ['1', '2']}, params={'lr': '5'}) and config['grid'] == {'lr': ['1', '2']}
    with pytest.raises(UsageError, match='set by the points'): with_options(config, {'model': 'resnet18'})

def test_names_are_stable_and_safe():
    assert point_name({'lr': 1e-3, '03_train.seed': 2}) == point_name({'03_train.seed': 2, 'lr': .001}) == '03_train.seed=2,lr=0.001'
    names = [point_name(v) for v in [{'d': '../../etc'}, {'d': '.._.._etc'}, {'d': 'x' * 500}, {'d': 'x' * 501}, {'d': 'a b'}, {'d': 'ü'}, {'b': True}, {'b': None}, {}]]
    assert len(set(names)) == len(names) and all(n == Path(n).name and len(n.encode()) < 200 and not n.startswith('.') for n in names)

def test_the_same_under_any_name_is_one_parameter(nbs):
    assert [p.name for p in plan(grid={'train.lr': ['1e-1'], '1.seed': ['0']}, baseline={}).points] == ['01_train.lr=0.1,01_train.seed=0']

def test_mistakes_are_found_before_anything_starts(nbs):
    for kwargs, message in [(dict(grid={'lrr': ['1']}), "did you mean 'lr'"), (dict(grid={'seed': ['a']}), 'expected int'), (dict(grid={'lr': ['1', '1.0']}), 'asked for twice'), (dict(points=[{'lr': '1'}]), 'in the grid and in the points'),
                            (dict(notebooks=['07']), 'unknown notebook'), (dict(baseline={'lr': '9'}), 'not one of the values'), (dict(baseline={'factor': '2'}), 'not one of'), (dict(needs={'00': ['01']}), 'comes later'),
                            (dict(grid={'run_dir': ['x']}), 'run_dir is not set'), (dict(grid={'seed': ['1', True]}), 'expected int')]:
        with pytest.raises(UsageError, match=message): plan(**kwargs)


# What is shared

def test_lessons_read_what_they_say():
    "Against what the lessons' folders were found to be read for: names in the code of each lesson and of each function behind it."
    paths = lessons()
    found = {p.stem: set(needs(p, [q.stem for q in paths[:i]])) for i, p in enumerate(paths)}
    assert found['00_data'] == set() and all('00_data' in f for name, f in found.items() if name != '00_data')  # behind `load_dataset`
    assert found['03_train'] == {'00_data', '01_explore'} and found['04_augment'] == {'00_data', '01_explore', '03_train'} and found['07_segment'] == {'00_data'}
    assert {'03_train', '04_augment', '06_gradcam', '07_segment'} <= found['08_masked'] and '01_explore' not in found['06_gradcam'] | found['08_masked']

def test_docstrings_and_later_names_are_no_needs(nbs):
    write_notebook('03_free', RUN_DIR, "def f():\n    '''Not 00_data.'''\n    return '04_later'", '%matplotlib inline\n"""01_train"""')
    write_notebook('04_reads', RUN_DIR, "from cxr_lab.data import load_dataset\nload_dataset", "f'{run_dir}/03_free/x'")
    write_notebook('05_says', f"{RUN_DIR}\nsource: str = '01_train'", 'from cxr_lab.data import load_dataset')
    earlier = ['00_data', '01_train', '02_judge', '03_free']
    assert needs('nbs/03_free.ipynb', earlier[:3]) == [] and needs('nbs/04_reads.ipynb', earlier) == ['00_data', '03_free']
    assert needs('nbs/05_says.ipynb', earlier) == ['01_train'], 'a parameter may name one; an import that is not used reads nothing'

def test_where_it_cannot_be_told_everything_before_is_read(nbs):
    Path('fails.py').write_text('1/0')
    write_notebook('03_unclear', RUN_DIR, 'from fails import f', 'f()')
    assert needs('nbs/03_unclear.ipynb', ['00_data', '01_train', '02_judge']) == ['00_data', '01_train', '02_judge']

def test_a_definition_in_another_lesson_changes_the_keys_of_those_that_use_it(monkeypatch):
    from cxr_lab.model import SmallCNN
    before = plan_sweep(data='phantom').points[0].steps
    assert plan_sweep(data='phantom').points[0].steps == before
    original = SmallCNN.__init__
    def narrow(self, widths=(8, 12, 24, 64)): original(self, widths)
    monkeypatch.setattr(SmallCNN, '__init__', narrow)
    now = plan_sweep(data='phantom').points[0].steps
    assert {n for n in now if now[n] == before[n]} == {'00_data', '01_explore', '02_model', '07_segment'}  # 02 has its network in its own cells

def test_equal_steps_have_equal_keys(nbs):
    p = plan(grid={'lr': ['.1', '.2'], 'factor': ['1', '2']})
    assert [sum(n.stem == s for n in p.nodes.values()) for s in ('00_data', '01_train', '02_judge')] == [1, 2, 4] and p.saved == 12 - 7
    assert '7 executions of notebooks instead of 12: 5 saved' in describe_plan(p)
    assert plan(notebooks=['02'], params={'n': '10'}, grid={}, baseline={}).notebooks == [f'nbs/{n}.ipynb' for n in ('00_data', '01_train', '02_judge')]  # and what it reads

def test_whatever_a_step_depends_on_changes_its_key(nbs, monkeypatch):
    write_notebook('00_data', f"{RUN_DIR}\nn: int = 10\nfolder: str = 'images'", DATA)
    Path('images').mkdir(); Path('images/a').write_text('1')
    keys = lambda: plan(grid={}, baseline={}).points[0].steps
    first = keys()
    assert keys() == first
    Path('images/a').write_text('12'); second = keys()
    assert not set(first.values()) & set(second.values())  # through all that follows
    write_notebook('02_judge', f'{RUN_DIR}\nfactor: float = 3.0', JUDGE); third = keys()
    assert third['02_judge'] != second['02_judge'] and third['01_train'] == second['01_train']
    write_notebook('02_judge', f'{RUN_DIR}\nfactor: float = 3.0', JUDGE + '\nprint(1)'); fourth = keys()
    assert fourth['02_judge'] != third['02_judge']
    assert keys() != plan(grid={}, baseline={}, needs={'01': []}).points[0].steps

def test_a_thousand_points_are_planned_in_seconds():
    plan_sweep(data='phantom')  # imports what the lessons import
    begin = time.process_time()  # of this process, whatever else the machine does
    p = plan_sweep(grid={'03_train.lr': [f'{i/1e4}' for i in range(1, 101)], '03_train.seed': [str(i) for i in range(10)]}, data='phantom')
    assert time.process_time() - begin < 5 and len(p.points) == 1000 and len(p.nodes) == 4 + 6*1000


# One step, one point

def test_a_point_is_a_run(nbs, capfd):
    p = plan(grid={'factor': ['1', '2']}, baseline={})
    results = by_hand(p, 'runs/s')
    assert ran() == ['data 10', 'judge', 'judge', 'train 0.1 0'] and all(r['state'] == 'done' for r in results.values())
    out = Path('runs/s')
    assert [finish_point(q, out, results) for q in p.points] == [dict(state='done')]*2
    one, two = (out/q.folder for q in p.points)
    assert (one/'01_train/metrics.json').samefile(two/'01_train/metrics.json') and not (one/'02_judge/metrics.json').samefile(two/'02_judge/metrics.json')
    assert (one/'01_train/01_train.ipynb').is_file() and not any(q.is_symlink() for q in out.rglob('*'))
    run_pipeline(nbs='nbs', run_dir=two, resume=True)
    assert ran() == [] and capfd.readouterr().err.count('complete') == 3  # the pipeline finds a complete run with the same parameters
    run_pipeline(nbs='nbs', run_dir=two, notebooks=['01'], params={'lr': '.5'})
    assert read_json(one/'01_train/metrics.json')['score'] < .5 < read_json(two/'01_train/metrics.json')['score']  # by hand in one point: that point only
    assert finish_point(p.points[1], out, results)['state'] == 'done' and read_json(two/'01_train/metrics.json')['score'] < .5

def test_run_json_is_that_of_a_run(nbs):
    "As one run of the same notebooks in one folder leaves it, times apart."
    head = 'from cxr_lab.runs import Step\n'
    write_notebook('00_data', f'{RUN_DIR}\nn: int = 10', head + "Step(run_dir, '00_data', dict(n=n)).record(dataset=dict(kind='phantom', n=n), last='data')")
    write_notebook('01_train', f'{RUN_DIR}\nlr: float = .1', head + "step = Step(run_dir, '01_train', dict(lr=lr))\nassert step.fact('dataset')['n'] == step.params('00_data')['n'] == 7\nstep.record(last='train')")
    write_notebook('02_judge', f'{RUN_DIR}\nfactor: float = 1.0', head + "step = Step(run_dir, '02_judge', dict(factor=factor))\nstep.need('00_data', '00_data.ipynb')")
    p = plan(params={'n': '7'}, grid={'lr': ['.2']}, baseline={})
    assert p.nodes[p.points[0].steps['02_judge']].upstream == {'00_data': p.points[0].steps['00_data']}
    results = by_hand(p, 'runs/s')
    finish_point(p.points[0], Path('runs/s'), results)
    run_pipeline(nbs='nbs', run_dir='runs/plain', params={'n': '7', 'lr': '.2'})
    ours, plain = (read_json(f'{d}/run.json') for d in (f'runs/s/{p.points[0].folder}', 'runs/plain'))
    for times in ('created', 'updated'): assert ours.pop(times) and plain.pop(times)
    assert ours == plain and ours['last'] == 'train'  # 02 was told 'data', but 01 came after

def test_a_need_that_was_missed_fails_instead_of_lying(nbs):
    write_notebook('02_judge', RUN_DIR, "from pathlib import Path\nprint((Path(run_dir)/('01_' + 'train')/'metrics.json').read_text())")
    p = plan(grid={}, baseline={})
    results = by_hand(p, 'runs/s')
    failure = results[p.points[0].steps['02_judge']]
    assert failure['state'] == 'failed' and failure['notebook'] == '02_judge' and failure['cell'] == 3 and 'FileNotFoundError' in failure['error'] and Path(failure['partial']).is_file()
    assert by_hand(plan(grid={}, baseline={}, needs={'02': ['01']}), 'runs/s').popitem()[1]['state'] == 'done'

def test_an_upstream_that_ran_again_makes_what_follows_run_again(nbs):
    p = plan(grid={}, baseline={})
    by_hand(p, 'runs/s'); ran()
    shutil.rmtree(f"runs/s/steps/01_train-{p.points[0].steps['01_train']}")
    assert set(S._states(p, Path('runs/s'))) == {p.points[0].steps['00_data']}
    by_hand(p, 'runs/s')
    assert ran() == ['judge', 'train 0.1 0']

def test_a_kernel_is_fresh_draws_and_ends_with_its_step(nbs):
    write_notebook('00_data', f'{RUN_DIR}\nn: int = 0', "assert 'left' not in globals()\nleft = 1", "import os, sys, pathlib\nimport matplotlib.pyplot as plt\n"
                   "pathlib.Path(f'kernel{n}').write_text(f'{os.getpid()} {os.environ[\"CXR_LAB_PROGRESS\"]} {os.environ[\"OMP_NUM_THREADS\"]} {os.getcwd()}')\nplt.plot([n]);", 'plt.show()', 'print(n)')
    p, pids = plan(notebooks=['00'], grid={'n': ['0', '1']}, baseline={}), []
    for i, node in enumerate(p.nodes.values()):
        assert run_step(node, 'runs/s', os.getcwd(), ['matplotlib.pyplot'], 3)['state'] == 'done'
        outputs = [o for c in nbformat.read(f'runs/s/{node.folder}/00_data/00_data.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs]
        assert any('image/png' in o.get('data', {}) for o in outputs) == ('MPLBACKEND' not in os.environ or 'inline' in os.environ['MPLBACKEND']) and outputs[-1].text == f'{i}\n'
        pid, progress, threads, cwd = Path(f'kernel{i}').read_text().split()
        assert (progress, threads, cwd) == ('0', '3', os.getcwd())
        pids.append(int(pid))
    assert pids[0] != pids[1]
    for pid in pids: wait_for(lambda: not alive(pid))


# A whole sweep

class Links(HTMLParser):
    def __init__(self, text): super().__init__(); self.found, self.text = [], ''; self.feed(text)
    def handle_starttag(self, tag, attrs): self.found += [v for k, v in attrs if k in ('href', 'src')] if tag in ('a', 'img') else []; assert tag != 'b'
    def handle_data(self, data): self.text += data

def test_a_sweep(nbs, capfd):
    "One story, because every cluster costs seconds: failure, keep going, resume, page, refusals."
    p = plan(grid={'lr': ['.1', '2', '.2'], 'seed': ['0', '1']}, baseline={'lr': '.1'})
    with pytest.raises(SweepFailed, match=r"2 of 6 points failed, 0 were not finished; --resume --out runs/s goes on\n  01_train in cell \[3\] `import json") as e: sweep(p, 'runs/s', workers=2, keep_going=True)
    assert 'the loss <b>diverged</b>' in str(e.value) and 'lr=2.0,seed=0' in str(e.value)
    assert ran() == sorted(['data 10', *['judge']*4, *[f'train {lr} {s}' for lr in (.1, .2, 2.) for s in (0, 1)]])
    err = capfd.readouterr().err
    assert 'dashboard: http://' in err and '4/6 points done, 0 steps running, 2 points failed' in err and 'Traceback' not in err
    states = pd.read_csv('runs/s/states.csv').set_index('point')
    assert states.state.to_dict() == {q.name: 'failed' if 'lr=2' in q.name else 'done' for q in p.points} and states.loc['lr=2.0,seed=0', 'cell'] == 3
    failure = read_json('runs/s/points/lr=2.0,seed=1/failed.json')
    assert failure['notebook'] == '01_train' and failure['error'] == 'ValueError: the loss <b>diverged</b>' and Path(failure['partial']).is_file() and not Path('runs/s/points/lr=2.0,seed=1/results.json').exists()
    table = pd.read_csv('runs/s/table.csv')
    assert set(table.run) == {q.name for q in p.points if 'lr=2' not in q.name} and set(table.metric) == {'n', 'score', 'gain'}
    pd.testing.assert_frame_equal(pd.read_parquet('runs/s/table.parquet').astype({'training_seed': float}), table.assign(place=''), check_dtype=False)
    assert pd.read_csv('runs/s/comparison.csv').set_index('metric').difference.round(6).to_dict() == {'score': .1, 'gain': .2}
    Path('runs/s').rename('runs/moved ü')  # links stay
    page = Links(Path('runs/moved ü/index.html').read_text())
    assert 'the loss <b>diverged</b>' in page.text and '4 of 6 points are done, 2 failed.' in page.text
    assert all((Path('runs/moved ü')/unquote(link)).is_file() for link in page.found) and sum(link.endswith('.ipynb') for link in page.found) == 4*3 + 2*1 + 2
    before, p2 = Path('runs/moved ü/table.csv').read_bytes(), plan()
    with pytest.raises(UsageError, match='--resume goes on'): sweep(p2, 'runs/moved ü')
    with pytest.raises(UsageError, match='is not a sweep'): sweep(p2, 'nbs')
    with FileLock('runs/moved ü/.pipeline.lock'), pytest.raises(RunInUse, match='another cxr-lab run is at work'): sweep(p2, 'runs/moved ü', resume=True)
    sweep(p2, 'runs/moved ü', resume=True)
    assert ran() == [] and Path('runs/moved ü/table.csv').read_bytes() == before

def test_without_keep_going_the_rest_is_not_begun(nbs):
    p = plan(grid={'lr': ['2'], 'seed': [str(i) for i in range(12)]}, baseline={})
    with pytest.raises(SweepFailed, match='were not finished'): sweep(p, 'runs/s', workers=1, threads=1)
    assert 1 <= len([line for line in ran() if line.startswith('train')]) < 6 and read_json('runs/s/sweep.json')['threads'] == 1


# What goes wrong outside

DRIVER = "from cxr_lab.sweep import *\nif __name__ == '__main__': sweep(plan_sweep(['01'], nbs='nbs', grid={'lr': ['.1', '.2'], 'seed': ['0', '1']}, baseline={'lr': '.1'}), 'runs/s', workers=2, resume=True)"

def alive(pid):
    stat = Path(f'/proc/{pid}/stat')
    try: return stat.read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False

def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.05)

def family(pid):
    import psutil
    try: return [c.pid for c in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []

def started(): return Path('log.txt').read_text().count('train') if Path('log.txt').exists() else 0

@pytest.mark.skipif(sys.platform != 'linux', reason='kills processes by what /proc tells')
@pytest.mark.parametrize('kills', [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_the_table_is_that_of_an_uninterrupted_sweep(nbs, kills):
    "The driver once; or the driver twice, and then a worker."
    import psutil
    Path('go.py').write_text(DRIVER)
    def drive():
        with open('said.txt', 'w') as said: return subprocess.Popen([sys.executable, 'go.py'], stderr=said)
    sweep(plan(notebooks=['01']), 'runs/s', workers=1)  # in this process, by one worker
    complete = {f: Path(f'runs/s/{f}').read_bytes() for f in ('table.csv', 'table.parquet', 'summary.csv', 'comparison.csv', 'states.csv')}
    shutil.rmtree('runs/s'); ran()
    Path('pause').write_text('1.5')
    for _ in range(1 if kills == 1 else 2):  # the driver, as soon as a step is under way
        before, driver = started(), drive()
        wait_for(lambda: started() > before)
        everybody = family(driver.pid)
        driver.kill(); driver.wait()
        wait_for(lambda: not any(map(alive, everybody)), 60)  # nobody goes on writing
    if kills == 1: Path('pause').unlink()  # nobody has to be met at work any more
    before, driver = started(), drive()
    if kills == 3:
        wait_for(lambda: started() > before)
        holding = [p for p in psutil.Process(driver.pid).children(recursive=True) if any(f.path.endswith('.kernel.lock') for f in p.open_files())]
        worker = next(p for p in holding[0].parents() if p.ppid() == driver.pid)  # the kernel's Dask worker
        worker.kill()
    assert driver.wait(600) == 0, Path('said.txt').read_text()
    assert {f: Path(f'runs/s/{f}').read_bytes() for f in complete} == complete
    assert 4 <= started() <= 4 + kills*2  # at most what was in flight was lost
    p = plan(notebooks=['01'])
    assert all((Path('runs/s')/n.folder/n.stem/'status.json').is_file() and not list((Path('runs/s')/n.folder/n.stem).glob('*.partial.ipynb')) for n in p.nodes.values())

def test_a_step_at_work_elsewhere_is_waited_for(nbs):
    p = plan(grid={}, baseline={})
    node = p.nodes[p.points[0].steps['00_data']]
    folder = Path('runs/s')/node.folder
    folder.mkdir(parents=True)
    code = f"from filelock import FileLock\nimport os, time\nwith FileLock('{folder}/.lock'):\n    print('held', flush=True)\n    time.sleep(2)\n    print(os.listdir('{folder}'), flush=True)"
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        assert run_step(node, 'runs/s', os.getcwd(), [], 0)['state'] == 'done' and other.stdout.readline() == "['.lock']\n" and other.wait() == 0  # it wrote nothing before

def test_a_full_disk_fails_the_point(nbs, tmp_path):
    "A real one of 400 kB; its first step fits, each of the others fills it."
    disk = tmp_path/'disk'
    disk.mkdir()
    if sys.platform != 'linux' or os.geteuid() != 0 or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('a small file system can be mounted by root on Linux only')
    try:
        write_notebook('01_train', f'{RUN_DIR}\nlr: float = 0.1\nseed: int = 0', "import json, pathlib\nstep = pathlib.Path(run_dir)/'01_train'\n(step/'metrics.json').write_text(json.dumps({'score': 1.0}))\n"
                       "if lr == .1: (step/'weights').write_bytes(b'x' * 300_000)\nif lr == .2: (step/'metrics.json').write_text('{\"score\": 1.0, \"' + 'x' * 500_000)")
        p = plan(notebooks=['01'], grid={'lr': ['.1', '.2', '.3']}, baseline={})
        out = disk/'s'
        with pytest.raises(SweepFailed) as e: sweep(p, out, workers=1, keep_going=True)
        assert re.search('No space left|disk is full', str(e.value)) and 'lr=0.2' in str(e.value), str(e.value)
        half = lambda f: not f.read_text().rstrip().endswith('}')
        assert [f.relative_to(out).parts[2:] for f in out.rglob('*.json') if half(f)] == [('01_train', 'metrics.json')]  # what the notebook itself left half written ...
        assert not any((f.parent/'status.json').exists() for f in out.rglob('*.json') if half(f))                       # ... is in a step that is not complete
        subprocess.run(['mount', '-o', 'remount,size=4m', str(disk)], check=True)
        write_notebook('01_train', f'{RUN_DIR}\nlr: float = 0.1\nseed: int = 0', "import json, pathlib\n(pathlib.Path(run_dir)/'01_train/metrics.json').write_text(json.dumps({'score': lr}))")
        sweep(plan(notebooks=['01'], grid={'lr': ['.1', '.2', '.3']}, baseline={}), out, workers=1, resume=True)
        assert pd.read_csv(out/'table.csv').query("metric == 'score'").value.tolist() == [.1, .2, .3]
    finally: subprocess.run(['umount', '-l', str(disk)])

def test_file_systems_without_hard_links(nbs, monkeypatch):
    def no(*args, **kwargs): raise PermissionError('no links here')
    monkeypatch.setattr(os, 'link', no)
    p = plan(notebooks=['01'], grid={}, baseline={})
    results = by_hand(p, 'runs/s')
    assert finish_point(p.points[0], Path('runs/s'), results)['state'] == 'done' and read_json('runs/s/points/point/01_train/metrics.json')['score'] > .1

def test_a_scheduler_by_address(nbs):
    from distributed import LocalCluster
    with pytest.raises(UsageError, match='no Dask scheduler answers'): sweep(plan(), 'runs/none', scheduler='tcp://127.0.0.1:9')
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:  # its workers may not have children
        sweep(plan(notebooks=['01'], grid={'lr': ['.1']}, baseline={}), 'runs/s', scheduler=cluster.scheduler_address)
    assert ran() == ['data 10', 'train 0.1 0']


# Long

@pytest.mark.slow
def test_hundreds_of_points_run_in_flat_memory(nbs):
    import psutil
    write_notebook('00_data', f'{RUN_DIR}\nn: int = 10  # how many', '1')
    peaks, me = [], psutil.Process()
    def watched(*args, **kwargs):
        peaks.append(me.memory_info().rss)
        return finish_point(*args, **kwargs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(S, 'finish_point', watched)
        sweep(plan(notebooks=['00'], grid={'n': [str(i) for i in range(300)]}, baseline={}), 'runs/s')
    assert len(peaks) == 300 and np.median(peaks[-50:]) < 1.1*np.median(peaks[50:100])  # the scheduler lives in this process; benchmarks/sweep.py does a thousand

@pytest.mark.slow
def test_lessons_killed_three_times(tmp_path, monkeypatch):
    "Real lessons on phantoms: the driver is killed while networks train."
    monkeypatch.chdir(tmp_path)
    Path('go.py').write_text("import sys\nfrom cxr_lab.sweep import *\nif __name__ == '__main__': sweep(plan_sweep(['03_train'], grid={'lr': ['1e-3', '3e-3'], '03_train.seed': ['0', '1']}, params=dict(seeds='1', epochs='4',"
                             " image_size='64', phantoms='160'), data='phantom', baseline={'lr': '1e-3'}), sys.argv[1], workers=2, resume=True)")
    def drive(out): return subprocess.Popen([sys.executable, 'go.py', out])
    assert drive('runs/whole').wait() == 0
    for i in range(3):
        driver = drive('runs/s')
        wait_for(lambda: len(list(Path('runs/s').glob('steps/03_train-*/03_train/seed_*/recipe.json'))) > i, 600)
        time.sleep(1 + 2*i)
        driver.kill(); driver.wait()
    assert drive('runs/s').wait() == 0
    for f in ('table.csv', 'summary.csv', 'comparison.csv'): assert Path(f'runs/s/{f}').read_bytes() == Path(f'runs/whole/{f}').read_bytes()
    for f in Path('runs/whole/points').glob('*/03_train/seed_*/predictions.csv'): assert f.read_bytes() == Path(str(f).replace('whole', 's')).read_bytes()
