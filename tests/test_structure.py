"""How the package is built, read from its text: who imports whom, one meaning per name, lines as wide as the page.

What is not yet as it should be stands in the lists that end in `_OPEN`. They are exact: a new fault fails, and so does
a line of a list whose fault is gone, so that the lists can only become shorter."""
import ast, json, re
from collections import defaultdict
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
WIDTH = 100
LESSONS = [p.stem[3:] for p in sorted((REPO/'nbs').glob('[0-9][0-9]_*.ipynb'))]  # in their order
GROUND = ['runs', 'edits', 'knobs', 'cores', 'kept', 'stored', 'phantom', 'films', 'images', 'scores', 'trainer',
          'networks', 'maps', 'lungs', 'reference', 'explorable']  # of nbs/lab: what lessons may import besides lower lessons

CIRCLES_OPEN = set()
PRIVATE_OPEN = set()  # module, where the name is from, name
TWICE_OPEN = {'CELLS': {'gradcam', 'kept'}, 'expose': {'augment', 'phantom'}}
WIDE_OPEN = set()  # notebooks with code lines that are too long


# What the text says

def modules(folder=REPO/'cxr_lab'):
    "Syntax trees of all modules, by name."
    return {p.stem: ast.parse(p.read_text()) for p in sorted(folder.glob('*.py')) if not p.stem.startswith('_')}

def imported(tree):
    "(module, name) of everything that comes from this package; name None where a whole module comes."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = ['cxr_lab'] * node.level + (node.module.split('.') if node.module else [])
            if module[0] != 'cxr_lab': continue
            for a in node.names: yield (module[1], a.name) if module[1:] else (a.name, None)
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith('cxr_lab.'): yield a.name.split('.')[1], None

def graph(trees): return {m: {k for k, _ in imported(t) if k in trees and k != m} for m, t in trees.items()}

def reached(m, edges):
    "All modules that an import of one brings."
    seen, waiting = set(), [m]
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen

def circles(edges):
    "Groups of modules that import each other, directly or by way of others."
    below = {m: reached(m, edges) for m in edges}
    groups = {tuple(sorted({k for k in below[m] if m in below[k]} | {m})) for m in edges if m in below[m]}
    return {group for group in groups if len(group) > 1}

def private(m, tree):
    "Names with an underscore that a module takes from another one."
    whole = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and not node.module:
            whole |= {a.asname or a.name: a.name for a in node.names}
    taken = {(k, name) for k, name in imported(tree) if name}
    taken |= {(whole[n.value.id], n.attr) for n in ast.walk(tree)
              if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in whole}
    return {(m, k, name) for k, name in taken if name.startswith('_') and not name.startswith('__') and k != m}

def defined(tree):
    "Public names that a module defines itself."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        else: names = []
        yield from (name for name in names if not name.startswith('_'))

def twice(trees):
    "Names that several modules define: {name: modules}."
    where = defaultdict(set)
    for m, tree in trees.items():
        for name in defined(tree): where[name].add(m)
    return {name: ms for name, ms in where.items() if len(ms) > 1}

def too_wide(text):
    "Lines that do not fit the page; what Quarto reads (`#|`) has to stand in one line."
    return [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith('#|')]


# The reading is right

def test_the_text_is_read_right(tmp_path):
    (tmp_path/'a.py').write_text('from .b import x, _y\nfrom . import c as see, __version__\nimport os, cxr_lab.d\nsee._z\n'
                                 'A, (B, _C) = 1, (2, 3)\nD: int = 4\nvalues = {}\nvalues[A] = B\ndef f(): from cxr_lab.c import z\n')
    for name, text in dict(b='x = 1; _y = 2', c='from .d import w\ndef f(): pass', d='from cxr_lab import b\nfrom .c import v\nw = 1').items():
        (tmp_path/f'{name}.py').write_text(text)
    trees = modules(tmp_path)
    edges = graph(trees)
    assert edges == {'a': {'b', 'c', 'd'}, 'b': set(), 'c': {'d'}, 'd': {'b', 'c'}}
    assert circles(edges) == {('c', 'd')} and reached('a', edges) == {'b', 'c', 'd'}
    assert private('a', trees['a']) == {('a', 'b', '_y'), ('a', 'c', '_z')}
    assert list(defined(trees['a'])) == ['A', 'B', 'D', 'values', 'f'] and twice(trees) == {'f': {'a', 'c'}}
    assert too_wide('x' * 100 + '\n' + 'y' * 101 + '\n#| ' + 'z' * 200) == ['y' * 101]

@pytest.fixture(scope='module')
def trees(): return modules()

@pytest.fixture(scope='module')
def edges(trees): return graph(trees)


# Imports

def test_the_ground_floor_imports_no_lesson(edges):
    assert {(m, k) for m in GROUND if m in edges for k in edges[m] if k not in GROUND} == set()

def test_lessons_import_lower_lessons_and_the_ground_floor(edges):
    number = {m: i for i, m in enumerate(LESSONS)}
    wrong = {(m, k) for m in LESSONS if m in edges for k in edges[m]
             if k not in GROUND and not number.get(k, len(LESSONS)) < number[m]}
    assert wrong == set()

def test_no_circle(edges): assert circles(edges) == CIRCLES_OPEN

def test_no_underscore_name_crosses_a_module(trees):
    assert {found for m, tree in trees.items() for found in private(m, tree)} == PRIVATE_OPEN


# Names

def test_one_meaning_per_name(trees): assert twice(trees) == TWICE_OPEN


# Width

NOTEBOOKS = {p.relative_to(REPO/'nbs').with_suffix('').as_posix(): p for p in sorted((REPO/'nbs').rglob('*.ipynb'))
             if '.ipynb_checkpoints' not in p.parts}

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_code_fits_the_page(name):
    cells = json.loads(NOTEBOOKS[name].read_text())['cells']
    wide = [line for c in cells if c['cell_type'] == 'code' for line in too_wide(''.join(c['source']))]
    if name in WIDE_OPEN: assert wide, f'{name} is done: take it off WIDE_OPEN'
    else: assert wide == []

@pytest.mark.parametrize('path', sorted((REPO/'cxr_lab').glob('[a-z]*.py')), ids=lambda p: p.stem)
def test_modules_fit_the_page(path):
    "As the notebook they come from; its title may be longer, and nbdev writes `__all__` as it likes."
    text = re.sub(r'(?s)\A""".*?"""\n|^__all__ = \[.*?\]\n', '', path.read_text(), flags=re.M)
    notebook = re.search(r'File to edit: \.\./nbs/(\S+)\.ipynb', text)[1]
    if notebook not in WIDE_OPEN: assert too_wide(text) == []

def test_what_is_open_exists(): assert WIDE_OPEN <= set(NOTEBOOKS)
