"Modules follow their notebooks: in a checkout, in a folder of lessons, for every kind of process."
import ast, json, os, shutil, socket, subprocess, sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxr_lab import edits
from cxr_lab.cli import app
from cxr_lab.edits import follow, lessons_at, lessons_of
from cxr_lab.kept import changed
from cxr_lab.pipeline import notebook_code
from cxr_lab.runs import read_metrics

SHOW = 'from cxr_lab.data import COLORS; print(COLORS["NORMAL"])'
FOLLOWS = '00_data was edited: cxr_lab.data follows it\n'


def copy_checkout(repo, folder):
    "A checkout in an empty folder that has been used once: the record is written."
    hidden = shutil.ignore_patterns('__pycache__', '.*')
    for name in ('settings.ini', 'nbs', 'cxr_lab'):
        if (repo/name).is_file(): shutil.copy2(repo/name, folder)
        else: shutil.copytree(repo/name, folder/name, ignore=hidden)
    assert follow(lessons_at(folder)) == ([], []), 'the modules of this checkout are out of step'

@pytest.fixture(scope='module')
def fresh(once, repo): return once('checkout', lambda folder: copy_checkout(repo, folder))

@pytest.fixture
def checkout(fresh, tmp_path):
    "A copy of it to be changed, as `pip install -e` would use it."
    return Path(shutil.copytree(fresh, tmp_path/'checkout'))

def start(code, folder, package, *args, **env):
    "A fresh Python in a folder, with the package that lies in another."
    usual = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_LESSONS'}
    return subprocess.Popen([sys.executable, '-c', code, *args], cwd=folder, text=True,
                            env=usual | {'PYTHONPATH': str(package)} | env,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def python(code, folder, package, *args, **env):
    "What it prints, on stdout and on stderr."
    out, err = (process := start(code, folder, package, *args, **env)).communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err

def cli(folder, package, *args, **env):
    "`cxr-lab` as a process: exit code and stderr."
    process = start('from cxr_lab.cli import main; main()', folder, package, *args, **env)
    _, err = process.communicate(timeout=600)
    return process.returncode, err

def edit(notebook, old, new):
    "Changes a text that stands once in the code of a notebook, and saves it."
    content = json.loads(notebook.read_text(encoding='utf-8'))
    code = [c for c in content['cells'] if c['cell_type'] == 'code']
    found = [c for c in code for _ in range(''.join(c['source']).count(old))]
    assert len(found) == 1, f'{old!r} stands {len(found)} times in {notebook.name}'
    found[0]['source'] = ''.join(found[0]['source']).replace(old, new)
    notebook.write_text(json.dumps(content), encoding='utf-8')


# In a checkout

def test_an_edited_cell_is_what_another_process_imports(checkout):
    edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
    assert python(SHOW, checkout/'nbs', checkout) == ('#0090B2\n', FOLLOWS)
    assert python(SHOW, checkout/'nbs', checkout) == ('#0090B2\n', ''), 'said once'
    assert python(SHOW, checkout.parent, checkout) == ('#0090B2\n', ''), 'and from anywhere'
    written = {path.name: path.read_bytes() for path in (checkout/'cxr_lab').glob('[a-z]*.py')}
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=checkout, check=True)
    for name, text in written.items(): assert (checkout/'cxr_lab'/name).read_bytes() == text, name

def test_a_comment_travels_and_changes_no_code(checkout):
    module = checkout/'cxr_lab/data.py'
    before = module.read_text()
    edit(checkout/'nbs/00_data.ipynb', 'COLORS = {', '# mine\nCOLORS = {')
    assert follow(lessons_at(checkout)).said == [FOLLOWS.strip()]
    assert module.read_text() == before.replace('COLORS = {', '# mine\nCOLORS = {')
    assert ast.dump(ast.parse(before)) == ast.dump(ast.parse(module.read_text()))

def test_what_is_not_exported_changes_no_module(checkout):
    before = (checkout/'cxr_lab/data.py').read_bytes()
    edit(checkout/'nbs/00_data.ipynb', 'joined = join_identical(', '# mine\njoined = join_identical(')
    assert follow(lessons_at(checkout)) == ([], [])
    assert (checkout/'cxr_lab/data.py').read_bytes() == before

def test_nbdev_is_imported_only_to_export(checkout):
    code = 'import sys, cxr_lab; print("nbdev" in sys.modules)'
    assert python(code, checkout, checkout) == ('False\n', '')
    edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
    assert python(code, checkout, checkout) == ('True\n', FOLLOWS)

def test_a_broken_edit_is_named_and_the_last_good_module_stays(checkout):
    notebook, module = checkout/'nbs/00_data.ipynb', checkout/'cxr_lab/data.py'
    before = module.read_bytes()
    edit(notebook, 'COLORS = {', 'COLORS = = {')
    code = [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    number = 1 + next(i for i, c in enumerate(code) if 'COLORS = =' in ''.join(c['source']))
    broken = (f'00_data was edited, and its module stays as it was: cell [{number}] '
              "`COLORS = = {'NORMAL': ")
    out, err = python(SHOW, checkout/'nbs', checkout)
    assert out == '#0072B2\n' and err.startswith(broken)
    assert err.endswith('does not compile: line 2, invalid syntax\n')
    code, err = cli(checkout, checkout, 'run', '00_data')
    assert code == 2 and f'cxr-lab: {broken}' in err and not (checkout/'runs').exists()
    assert module.read_bytes() == before
    assert not list((checkout/'cxr_lab').glob('.*')), 'nothing is left behind'
    edit(notebook, "COLORS = = {'NORMAL': '#0072B2'", "COLORS = {'NORMAL': '#0090B2'")
    assert python(SHOW, checkout/'nbs', checkout) == ('#0090B2\n', FOLLOWS)

def test_a_notebook_that_is_none_is_named(checkout):
    (checkout/'nbs/00_data.ipynb').write_text('<<<<<<< HEAD\n{"cells": [')
    said, (broken,) = follow(lessons_at(checkout))
    assert said == [] and broken.startswith('00_data was edited, and its module stays as it was: ')

def test_of_processes_that_start_together_one_exports(checkout):
    edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
    processes = [start(SHOW, checkout, checkout) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in answers] == ['#0090B2\n'] * 3
    assert sorted(err for _, err in answers) == ['', '', FOLLOWS]

def test_two_versions_never_share_a_second(checkout):
    "Python would take the compiled first one for the second."
    lessons, module = lessons_at(checkout), checkout/'cxr_lab/data.py'
    times = [int(module.stat().st_mtime)]
    for old, new in (('#0072B2', '#1072B2'), ('#1072B2', '#2072B2'), ('#2072B2', '#3072B2')):
        edit(checkout/'nbs/00_data.ipynb', old, new)
        assert follow(lessons).said == [FOLLOWS.strip()]
        times.append(int(module.stat().st_mtime))
    assert times == sorted(set(times))

def test_what_was_written_into_a_module_by_hand_is_not_lost(checkout):
    module = checkout/'cxr_lab/data.py'
    before = module.read_text()
    module.write_text(before + '\nMINE = 1\n')
    told, = follow(lessons_at(checkout)).said
    assert told == 'cxr_lab.data was changed and 00_data was not: cxr_lab.data follows it'
    assert module.read_text() == before
    assert (checkout/'cxr_lab/__pycache__/data.replaced.py').read_text() == before + '\nMINE = 1\n'

def test_a_copy_of_a_lesson_is_not_followed(checkout):
    for name in ('00_data-Copy1.ipynb', '00_data_old.ipynb'):
        shutil.copy(checkout/'nbs/00_data.ipynb', checkout/'nbs'/name)
        edit(checkout/'nbs'/name, '#0072B2', '#0090B2')
    assert follow(lessons_at(checkout)) == ([
        '00_data-Copy1 is not followed: cxr_lab.data is 00_data.ipynb',
        '00_data_old is not followed: cxr_lab.data is 00_data.ipynb'], [])
    assert '#0072B2' in (checkout/'cxr_lab/data.py').read_text()

def test_a_lesson_of_ones_own_has_a_module(checkout):
    cells = ('#| default_exp mine', '#| export\nfrom cxr_lab.data import COLORS')
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=s)
             for i, s in enumerate(cells)]
    notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (checkout/'nbs/10_mine.ipynb').write_text(json.dumps(notebook))
    out, err = python('from cxr_lab.mine import COLORS; print(*COLORS)', checkout, checkout)
    assert (out, err) == ('NORMAL PNEUMONIA\n', '10_mine was edited: cxr_lab.mine follows it\n')

def test_what_works_for_another_process_exports_nothing(checkout, tmp_path):
    edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
    worker = edits.for_children(lessons_at(checkout))
    assert python(SHOW, tmp_path, checkout, **worker) == ('#0072B2\n', '')
    assert python(SHOW, tmp_path, checkout) == ('#0090B2\n', FOLLOWS)

def test_a_running_kernel_hears_of_an_edit(checkout):
    from jupyter_client.manager import start_new_kernel
    env = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_LESSONS'} | {'PYTHONPATH': str(checkout)}
    manager, client = start_new_kernel(kernel_name='python3', cwd=str(checkout/'nbs'), env=env)
    printed = []
    def execute(code):
        printed.clear()
        keep = lambda m: printed.append(m['content'].get('text', ''))
        reply = client.execute_interactive(code, timeout=120, output_hook=keep)
        assert reply['content']['status'] == 'ok', reply
        return ''.join(printed)
    try:
        assert execute(SHOW) == '#0072B2\n'
        edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
        said = '00_data was edited: cxr_lab.data follows it; restart the kernel, which has the earlier one\n'
        assert execute('print(1)') == said + '1\n'
        assert execute(SHOW) == '#0072B2\n', 'it has, and the line was not repeated'
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# Elsewhere

@pytest.fixture
def installed(repo, tmp_path):
    "The package as `pip install .` leaves it."
    site = tmp_path/'site'
    shutil.copytree(repo/'cxr_lab', site/'cxr_lab', ignore=shutil.ignore_patterns('__pycache__', '.*'))
    (site/'cxr_lab/notebooks').mkdir()
    for path in (repo/'nbs').glob('[0-9]*.ipynb'): shutil.copy(path, site/'cxr_lab/notebooks')
    return site

def test_in_a_checkout_its_modules_come_before_the_installed_ones(checkout, installed):
    edit(checkout/'nbs/00_data.ipynb', '#0072B2', '#0090B2')
    assert python(SHOW, checkout/'nbs', installed) == ('#0090B2\n', FOLLOWS)
    where = 'from cxr_lab.pipeline import notebooks_dir; print(notebooks_dir())'
    assert python(where, checkout/'nbs/lab', installed) == (f'{checkout/"nbs"}\n', '')
    assert '#0072B2' in (installed/'cxr_lab/data.py').read_text()

def test_a_folder_of_lessons(installed, tmp_path):
    code, err = cli(tmp_path, installed, 'lessons', 'mine')
    mine = tmp_path/'mine'
    assert (code, err) == (0, '') and lessons_of(mine) == (mine, mine, mine/'cxr_lab')
    assert python(SHOW, mine, installed) == ('#0072B2\n', '')
    edit(mine/'00_data.ipynb', '#0072B2', '#0090B2')
    assert python(SHOW, mine, installed) == ('#0090B2\n', FOLLOWS)
    assert [path.name for path in (mine/'cxr_lab').glob('*.py')] == ['data.py']
    where = 'from cxr_lab.pipeline import notebooks_dir; print(notebooks_dir())'
    assert python(where, mine, installed) == (f'{mine}\n', '')
    assert python(SHOW, tmp_path, installed) == ('#0072B2\n', ''), 'elsewhere nothing has changed'
    edit(mine/'00_data.ipynb', '#0090B2', '#0072B2')
    back = '00_data was edited: cxr_lab.data is the installed one again\n'
    assert python(SHOW, mine, installed) == ('#0072B2\n', back)
    assert not list((mine/'cxr_lab').glob('*.py'))

def test_a_run_says_whose_lessons_run_where_that_is_a_question(installed, tmp_path):
    code, err = cli(tmp_path, installed, 'run', '-p', 'unknown=1')
    assert code == 2 and err.startswith('the lessons of the installed package run; `cxr-lab lessons')
    shutil.copytree(installed/'cxr_lab/notebooks', tmp_path/'copied')
    code, err = cli(tmp_path, installed, 'run', '-p', 'unknown=1', '--nbs', 'copied')
    assert code == 2 and err.startswith('copied was not made by `cxr-lab lessons`: what its notebooks')
    cli(tmp_path, installed, 'lessons', 'mine')
    for folder, options in ((tmp_path/'mine', []), (tmp_path, ['--nbs', 'mine'])):
        code, err = cli(folder, installed, 'run', '-p', 'unknown=1', *options)
        assert code == 2 and err.startswith("cxr-lab: unknown parameter 'unknown'"), err

def test_of_other_lessons_the_code_is_theirs(checkout, repo):
    "`--resume` asks for the modules that the kernels get, not for those of this process."
    explore = checkout/'nbs/01_explore.ipynb'
    ours, before = notebook_code(repo/'nbs/01_explore.ipynb'), notebook_code(explore)
    assert before == ours, 'a copy has the same code'
    edit(checkout/'nbs/lab/runs.ipynb', "CLASSES = ('NORMAL', 'PNEUMONIA')",
         "CLASSES = ('NORMAL', 'OPACITY')")
    assert follow(lessons_at(checkout)).broken == []
    assert changed(before[0], notebook_code(explore)[0]) == ['CLASSES[1]', '_MEMBER']
    assert notebook_code(repo/'nbs/01_explore.ipynb') == ours


# The whole way

SMALL = dict(phantoms=96, image_size=64, epochs=1, seeds=1)

def lab_kernel(folder, notebook, setting):
    "Runs a notebook from top to bottom in a kernel that JupyterLab's server starts, and returns what it printed."
    import requests
    from jupyter_client.blocking import BlockingKernelClient
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry
    env = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_LESSONS'}
    env |= {'JUPYTER_RUNTIME_DIR': str(folder/'.runtime'), 'PYTHONPATH': str(folder), 'JUPYTER_TOKEN': 'secret'}
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--ServerApp.port={port}', f'--ServerApp.root_dir={folder}']
    server = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL)
    try:
        body = dict(path=notebook, type='notebook', name='', kernel=dict(name='python3'))
        retry = Retry(connect=12, backoff_factor=.1, allowed_methods=None)  # while the server starts
        http = requests.Session()
        http.mount('http://', HTTPAdapter(max_retries=retry))
        session = http.post(f'http://127.0.0.1:{port}/api/sessions', json=body, timeout=60,
                            headers={'Authorization': 'token secret'})
        kernel = session.json()['kernel']['id']
        client = BlockingKernelClient(connection_file=str(folder/'.runtime'/f'kernel-{kernel}.json'))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        printed = []
        for cell in json.loads((folder/notebook).read_text())['cells']:
            if cell['cell_type'] != 'code': continue
            source = ''.join(cell['source'])
            if 'parameters' in cell['metadata'].get('tags', []):
                source += ''.join(f'\n{k} = {v!r}' for k, v in setting.items())
            keep = lambda m: printed.append(m['content'].get('text', ''))
            reply = client.execute_interactive(source, timeout=600, output_hook=keep)['content']
            assert reply['status'] == 'ok', reply
        client.stop_channels()
        return ''.join(printed)
    finally:
        server.terminate()
        server.wait(60)

def parameters_of_small_cnn(widths):
    "Counted by hand: a strided stem, then blocks of one, two and two convolutions, normalized; two logits."
    total = (25 + 2) * widths[0]
    for depth, into, out in zip((1, 2, 2), widths, widths[1:]):
        total += (9 * into + 2) * out + (depth - 1) * (9 * out + 2) * out
    return total + 2 * widths[-1] + 2

@pytest.mark.slow
def test_the_network_that_a_reader_widens_is_what_lesson_03_trains(checkout):
    "By `cxr-lab run`, and in JupyterLab; and a comment trains nothing."
    network, trained = checkout/'nbs/02_model.ipynb', checkout/'runs/default/03_train/seed_0'
    options = [part for k, v in SMALL.items() for part in ('-p', f'{k}={v}')]
    edit(network, 'widths: tuple = (16, 24, 48, 96)', 'widths: tuple = (8, 12, 24, 48)')
    lessons = ('00_data', '01_explore', '02_model', '03_train')
    code, err = cli(checkout, checkout, 'run', *lessons, *options)
    assert code == 0 and err.startswith('02_model was edited: cxr_lab.model follows it\n'), err
    count = read_metrics(trained/'metrics.json')['n_parameters']
    assert count == parameters_of_small_cnn((8, 12, 24, 48))

    edit(network, 'widths: tuple = (8, 12, 24, 48)', 'widths: tuple = (8, 16, 24, 40)')
    setting = dict(seeds=1, epochs=1)
    said = lab_kernel(checkout, 'nbs/03_train.ipynb', setting)
    assert said.startswith('02_model was edited: cxr_lab.model follows it\n')
    count = read_metrics(trained/'metrics.json')['n_parameters']
    assert count == parameters_of_small_cnn((8, 16, 24, 40))

    model = trained/'model.safetensors'
    before = model.stat().st_mtime_ns, model.read_bytes()
    edit(network, 'widths: tuple = (8, 16, 24, 40),', 'widths: tuple = (8, 16, 24, 40),  # mine:')
    said = lab_kernel(checkout, 'nbs/03_train.ipynb', setting)
    assert said.startswith('02_model was edited: cxr_lab.model follows it\n') and 'kept from' in said
    assert (model.stat().st_mtime_ns, model.read_bytes()) == before
