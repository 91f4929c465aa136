"The solutions: one for each exercise of each lesson, found by its link, executed on phantoms."
import ast, json, re
from pathlib import Path

import pytest
from test_edits import copy_checkout, start

REPO = Path(__file__).resolve().parent.parent
LESSONS = sorted((REPO/'nbs').glob('[0-9][0-9]_*.ipynb'))

def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']

def anchors():
    "'03-1' -> its heading, for all solutions, in their order."
    texts = (''.join(c['source']) for c in cells(REPO/'nbs/solutions.ipynb'))
    found = [re.match(r'<a id="(\d\d-\d)"></a>\n\n### (\d\d\.\d) \S', t) for t in texts]
    return {m[1]: m[2] for m in found if m}

def test_three_solutions_for_each_lesson_in_order():
    wanted = [f'{path.stem[:2]}-{k}' for path in LESSONS for k in (1, 2, 3)]
    assert list(anchors()) == wanted
    assert [number.replace('.', '-') for number in anchors().values()] == wanted

@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_each_exercise_links_to_its_solution_and_gives_nothing_away(path):
    text, = (t for t in map(lambda c: ''.join(c['source']), cells(path)) if '## Exercises' in t)
    asked = re.split(r'(?m)^\d\. ', text.partition('## Exercises')[2])[1:]
    assert len(asked) == 3 and '<details>' not in text
    for k, exercise in enumerate(asked, 1):
        assert f'([solution](solutions.ipynb#{path.stem[:2]}-{k}))' in ' '.join(exercise.split())

def test_a_solution_computes_and_asserts():
    found, now = {}, None
    for cell in cells(REPO/'nbs/solutions.ipynb'):
        text = ''.join(cell['source'])
        if m := re.match(r'<a id="(\d\d-\d)">', text): now = found.setdefault(m[1], [])
        elif text.startswith('## '): now = None
        if now is not None: now.append((cell['cell_type'], text))
    for name, parts in found.items():
        code = '\n'.join(text for kind, text in parts if kind == 'code')
        words = '\n'.join(text for kind, text in parts if kind == 'markdown').partition('### ')[2]
        assert re.search(r'^ *assert ', code, re.M), f'{name} claims nothing that could fail'
        assert len(words.split()) > 25, f'{name} says nothing about what is seen'
        for kind, text in parts:
            lines = [line for line in text.splitlines() if not line.startswith('#|')]
            assert kind == 'markdown' or len(lines) <= 20, f'{name}: a cell of {len(lines)} lines'

def bound(source):
    "Names that a cell binds at its top level."
    tree = ast.parse(source)
    built = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.SetComp))
             for n in ast.walk(f) if n is not f}
    return built | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in inner}

def test_no_solution_takes_away_what_all_share():
    code = [''.join(c['source']) for c in cells(REPO/'nbs/solutions.ipynb') if c['cell_type'] == 'code']
    shared = set().union(*map(bound, code[:3]))
    assert {'data', 'step', 'train', 'validation', 'test', 'plain', 'augmented', 'SMALL'} <= shared
    for source in code[3:]: assert not bound(source) & shared, source

EXECUTE = """
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read('solutions.ipynb', 4)
NotebookClient(notebook, timeout=3000, kernel_name='python3').execute()
nbformat.write(notebook, 'solutions.ipynb')
"""

@pytest.mark.slow
@pytest.mark.integration
def test_the_solutions_run_from_top_to_bottom(repo, tmp_path):
    "In a copy of the checkout, with a cache of its own: every assertion holds, nothing is said on stderr."
    copy_checkout(repo, tmp_path)
    process = start(EXECUTE, tmp_path/'nbs', tmp_path, CXR_LAB_CACHE=str(tmp_path/'cache'))
    _, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err[-3000:]
    for cell in cells(tmp_path/'nbs/solutions.ipynb'):
        for output in cell.get('outputs', []): assert output.get('name') != 'stderr', output['text']
