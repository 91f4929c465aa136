"The solutions: one for each exercise of each lesson, found by its link, executed on phantoms."
import json, re
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
