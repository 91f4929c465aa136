"A folder of lessons to work in; and what git sees of notebooks that were run."
import json, os, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from cxr_lab.cli import app
from cxr_lab.edits import lessons_at
from cxr_lab.pipeline import UsageError, lessons
from cxr_lab.workplace import as_committed, copy_lessons, git_is_quiet


def ran(path, kernel='my-kernel'):
    "What JupyterLab leaves when a lesson has been run: outputs, numbers, the kernel's name."
    notebook = nbformat.read(path, 4)
    notebook.metadata = {'kernelspec': {'name': kernel, 'display_name': 'Mine', 'language': 'python'},
                         'language_info': {'name': 'python', 'version': '3.13.1'}}
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == 'code'), 7):
        cell.execution_count = number
        cell.metadata['execution'] = {'iopub.status.busy': '2026-01-01T00:00:00Z'}
        cell.outputs = [nbformat.v4.new_output('execute_result', {'text/plain': str(number)},
                                               execution_count=number)]
    nbformat.write(notebook, path)

def rewrite(path, old, new):
    notebook = nbformat.read(path, 4)
    found = [c for c in notebook.cells if old in c.source]
    assert len(found) == 1
    found[0].source = found[0].source.replace(old, new)
    nbformat.write(notebook, path)


# A folder of lessons

def test_the_lessons_are_copied_without_outputs(tmp_path):
    copied, sources = copy_lessons(tmp_path/'mine'), lessons()
    assert [p.name for p in copied] == [p.name for p in sources] and len(copied) == 10
    for path, source in zip(copied, sources):
        mine, theirs = nbformat.read(path, 4), nbformat.read(source, 4)
        nbformat.validate(mine)
        assert [(c.id, c.cell_type, c.source) for c in mine.cells] == [
            (c.id, c.cell_type, c.source) for c in theirs.cells]
        assert not any(c.get('outputs') or c.get('execution_count') for c in mine.cells)
    assert lessons_at(tmp_path/'mine').notebooks == tmp_path/'mine'

def test_what_was_only_run_is_replaced_and_what_was_edited_never(tmp_path):
    first, *_, last = copy_lessons(tmp_path)
    before = first.read_bytes()
    ran(first)
    assert first.read_bytes() != before and copy_lessons(tmp_path) and first.read_bytes() == before
    ran(first)
    rewrite(last, '# 09', '# My 09')
    state = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=f'{last.name} would be replaced'): copy_lessons(tmp_path)
    assert state == {p: p.read_bytes() for p in tmp_path.iterdir()}, 'nothing was touched'

def test_lessons_of_somebody_else_are_not_replaced(tmp_path, repo):
    (tmp_path/'00_data.ipynb').write_bytes((repo/'nbs/00_data.ipynb').read_bytes())
    with pytest.raises(UsageError, match='00_data.ipynb would be replaced'): copy_lessons(tmp_path)
    (tmp_path/'file').touch()
    with pytest.raises(UsageError, match='file is a file'): copy_lessons(tmp_path/'file')

def test_the_command_says_how_to_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ['lessons', 'mine'])
    assert (done.exit_code, done.stdout) == (0, '10 lessons; begin with: jupyter lab mine/00_data.ipynb\n')
    rewrite(Path('mine/00_data.ipynb'), '# 00', '# My 00')
    done = CliRunner().invoke(app, ['lessons', 'mine'])
    assert done.exit_code == 2 and '00_data.ipynb would be replaced' in done.stderr


# What git sees of a notebook

def notebook(*cells, **metadata):
    made = [nbformat.v4.new_code_cell(source, id=name, execution_count=1, outputs=[
            nbformat.v4.new_output('stream', text=name)]) for name, source in cells]
    return nbformat.writes(nbformat.v4.new_notebook(cells=made, metadata=metadata)).encode() + b'\n'

def cells_of(content): return json.loads(content)['cells']

def test_an_edit_is_left_and_nothing_else():
    before = notebook(('a', 'x = 1'), ('b', 'y = 2'), ('c', 'z = 3'))
    now = json.loads(notebook(('a', 'x = 1'), ('new', 'print(x)'), ('c', 'z = 4\nprint(z)'), kernelspec={'name': 'k', 'display_name': 'K'}))
    now['cells'][0] |= {'execution_count': 12, 'outputs': []}
    seen = as_committed(json.dumps(now).encode(), before)
    a, new, c = cells_of(seen)
    was_a, _, was_c = cells_of(before)
    assert a == was_a and json.loads(seen)['metadata'] == json.loads(before)['metadata']
    assert new == {'cell_type': 'code', 'id': 'new', 'metadata': {}, 'source': ['print(x)'],
                   'execution_count': None, 'outputs': []}
    assert c == was_c | {'source': ['z = 4\n', 'print(z)']}
    nbformat.validate(nbformat.reads(seen.decode(), 4))
    assert as_committed(seen, before) == seen, 'what git has seen it sees again'

def test_tags_and_pictures_in_the_text_are_written_and_the_order_is():
    before = notebook(('a', 'x = 1'), ('b', 'y = 2'))
    now = json.loads(before)
    now['cells'].reverse()
    now['cells'][0]['metadata'] = {'tags': ['parameters'], 'collapsed': True}
    note = nbformat.v4.new_markdown_cell('![](attachment:p.png)', id='m', attachments={'p.png': {'image/png': 'AA'}})
    now['cells'].append(note)
    seen = cells_of(as_committed(json.dumps(now).encode(), before))
    assert [c['id'] for c in seen] == ['b', 'a', 'm']
    assert seen[0]['metadata'] == {'tags': ['parameters']}
    assert seen[2]['attachments'] == {'p.png': {'image/png': 'AA'}} and 'outputs' not in seen[2]

def test_a_new_notebook_comes_without_outputs_and_a_torn_one_as_it_is():
    seen = as_committed(notebook(('a', 'x = 1'), kernelspec={'name': 'mine', 'display_name': 'Mine'}), None)
    assert [c['outputs'] for c in cells_of(seen)] == [[]]
    assert json.loads(seen)['metadata']['kernelspec']['name'] == 'python3'
    nbformat.validate(nbformat.reads(seen.decode(), 4))
    torn = b'<<<<<<< HEAD\n{"cells": ['
    assert as_committed(torn, notebook(('a', 'x'))) == torn


# In a repository

@pytest.fixture
def checkout(repo, tmp_path, monkeypatch):
    "A clone of the lab with two lessons and a page of the machinery, and how to call git and the lab there."
    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'): monkeypatch.delenv(name, raising=False)
    root = tmp_path/'checkout'
    (root/'nbs/lab').mkdir(parents=True)
    for name in ('settings.ini', '.gitattributes', '.gitignore', 'nbs/00_data.ipynb', 'nbs/02_model.ipynb', 'nbs/lab/kept.ipynb'):
        shutil.copy(repo/name, root/name)
    shutil.copytree(repo/'cxr_lab', root/'cxr_lab', ignore=shutil.ignore_patterns('__pycache__', '.*'))
    env = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_LESSONS'} | {'PYTHONPATH': str(root)}
    def call(*command):
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    def git(*args): return call('git', '-c', 'user.name=x', '-c', 'user.email=x@example.org', *args)
    def lab(*args): return call(sys.executable, '-c', 'from cxr_lab.cli import main; main()', *args)
    git('init', '-q')
    git('add', '.')
    git('commit', '-qm', 'The lab')
    return root, git, lab

def test_working_through_the_lessons_leaves_git_clean(checkout):
    root, git, lab = checkout
    for path in root.glob('nbs/**/*.ipynb'): ran(path)
    assert len(git('status', '--porcelain').splitlines()) == 3, 'without the command git sees it all'
    lab('quiet-git')
    assert git('status', '--porcelain') == '' and git_is_quiet(root)
    for path in root.glob('nbs/**/*.ipynb'): ran(path, 'another-kernel')
    assert git('diff') == ''
    lab('quiet-git')
    assert git('status', '--porcelain') == ''

    rewrite(root/'nbs/00_data.ipynb', "joined = join_identical(pd.Series(['anna'", "joined = join_identical(pd.Series(['eva'")
    lab('quiet-git')
    assert git('diff', '--cached') == '', 'an edit is staged by nobody else'
    changed = [line for line in git('diff', '-U0').splitlines() if line[0] in '+-' and line[:3] not in ('+++', '---')]
    assert len(changed) == 2 and "['anna'" in changed[0] and "['eva'" in changed[1]
    git('commit', '-qam', 'Mine')
    assert git('status', '--porcelain') == ''
    assert git('diff', '--shortstat', 'HEAD~').startswith(' 1 file changed, 1 insertion')

    lab('quiet-git', '--off')
    assert len(git('status', '--porcelain').splitlines()) == 3 and not git_is_quiet(root)

def test_a_pull_does_not_stop_at_outputs(checkout):
    root, git, lab = checkout
    lab('quiet-git')
    main = git('branch', '--show-current').strip()
    git('switch', '-qc', 'newer')
    rewrite(root/'nbs/02_model.ipynb', '# 02', '# Newer 02')
    git('commit', '-qam', 'Newer')
    git('switch', '-q', main)
    for path in root.glob('nbs/**/*.ipynb'): ran(path)
    lab('quiet-git')
    git('merge', '-q', 'newer')
    assert git('status', '--porcelain') == '' and '# Newer 02' in (root/'nbs/02_model.ipynb').read_text()

def test_nothing_is_published_behind_the_back_of_git(checkout, tmp_path):
    root, _, lab = checkout
    (tmp_path/'run').mkdir()
    lab('quiet-git')
    done = CliRunner().invoke(app, ['publish', str(tmp_path/'run'), '--nbs', str(root/'nbs')])
    assert done.exit_code == 2 and 'first `cxr-lab quiet-git --off`' in done.stderr

def test_without_a_checkout_there_is_nothing_to_quiet(checkout, tmp_path):
    root, *_ = checkout
    shutil.rmtree(root/'.git')
    env = {k: v for k, v in os.environ.items() if k != 'CXR_LAB_LESSONS'} | {'PYTHONPATH': str(root)}
    command = [sys.executable, '-c', 'from cxr_lab.cli import main; main()', 'quiet-git']
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and 'this is no checkout of the lab' in done.stderr
