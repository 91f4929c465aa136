"The solutions: one for each exercise of each lesson, found by its link, executed on phantoms."
import json, re
from pathlib import Path

import pytest

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
