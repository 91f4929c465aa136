"Which changes make a result another one: every definition and value it uses, and nothing else."
import ast, functools, importlib.util, json, os, shutil, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_lab.kept import changed, code_of, is_ours

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def module(tmp_path):
    "`module(text)`: a module with this text, loaded from a file of its own."
    count = iter(range(1000))
    def load(text, name=None):
        file = tmp_path/f'{name or f"m{next(count)}"}.py'
        file.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = loaded
        spec.loader.exec_module(loaded)
        return loaded
    return load

BASE = '''
import functools
from dataclasses import dataclass, field
SCALE = {'a': (1, 2.5)}
def helper(x, power=2): return SCALE['a'][0] * x**power
def cached(x): return x + 1
cached = functools.lru_cache(cached)
def decorate(f):
    @functools.wraps(f)
    def inner(*a): return f(*a) + 10
    return inner
@decorate
def decorated(x): return -x
class Base:
    def shared(self): return 4
class Model(Base):
    bias = 1
    def __init__(self, width=3): self.width = width
    @property
    def twice(self): return 2 * self.width
    @staticmethod
    def still(x): return x
    @classmethod
    def make(cls): return cls()
    def answer(self, x): return helper(x) + cached(x) + decorated(x) + self.bias + self.twice + (lambda y: y * 3)(x)
@dataclass
class Facts:
    n: int = 5
    names: list = field(default_factory=list)
def outer():
    k = 7
    def inner(x): return x + k
    return inner
closure = outer()
def root(): return Model.make().answer(2), Facts(), closure(1)
def unused(): return 0
'''

CHANGES = ["'a': (1, 2.5)|'a': (1, 2.6)", "power=2|power=3", "[0] * x|[1] * x", "return x + 1|return x + 2", "+ 10|+ 11", "return -x|return +x",
           "return 4|return 5", "bias = 1|bias = 2", "width=3|width=4", "return 2 * self|return 3 * self", "return x\n    @class|return [x]\n    @class",
           "return cls()|return cls(9)", "y * 3|y * 4", "n: int = 5|n: int = 6", "default_factory=list|default_factory=lambda: [1]", "k = 7|k = 8",
           "x + k|x - k", "answer(2)|answer(3)", "@decorate\ndef|def", "class Model(Base)|class Model"]

@pytest.mark.parametrize('change', CHANGES)
def test_a_change_of_what_is_used_is_seen(module, change):
    old, new = change.split('|')
    assert BASE.count(old) >= 1
    before, now = code_of(module(BASE).root), code_of(module(BASE.replace(old, new)).root)
    assert changed(before, now) and not any('cannot tell' in v for v in (before | now).values())

def test_what_says_nothing_about_the_result_changes_nothing(module):
    before = code_of(module(BASE).root)
    lines = BASE.replace('SCALE =', '\n\n# a comment\nSCALE =').replace('def answer(self, x): return', 'def answer(self, x: int) -> int:\n        "What is asked for."\n        return  ')
    assert changed(before, code_of(module(lines).root)) == []
    assert changed(before, code_of(module(BASE.replace('return 0', 'return 1') + '\nOTHER = 3').root)) == []

def test_where_a_definition_stands_does_not_matter(module):
    module('SCALE = 3\ndef helper(x): return SCALE * x\n', 'elsewhere')
    one = module('SCALE = 3\ndef helper(x): return SCALE * x\ndef root(): return helper(1)\n')
    imported = module('from elsewhere import helper\ndef root(): return helper(1)\n')
    inside = module('def root():\n    from elsewhere import helper\n    return helper(1)\n')
    attribute = module('import elsewhere\ndef root(): return elsewhere.helper(1)\n')
    assert changed(code_of(one.root), code_of(imported.root)) == []
    assert {k: v for k, v in code_of(one.root).items() if k != 'root'} == {k: v for k, v in code_of(inside.root).items() if k != 'root'}
    assert {'SCALE', 'helper'} <= set(code_of(attribute.root))

def test_values_are_part_of_it():
    def with_value(v): return code_of(functools.partial(int, v))
    for a, b in [(1, 2), (1, 1.), ('a', 'b'), ([1], [2]), ([1], (1,)), ({'a': 1}, {'a': 2}), ({'a': 1}, {'b': 1}), (np.arange(3), np.arange(3.)),
                 (np.arange(3), np.arange(4)), (torch.zeros(2), torch.ones(2)), (Path('a'), Path('b')), (None, False)]:
        assert changed(with_value(a), with_value(b)), (a, b)
    for same in (1, 'a', [1, {'a': None}], {3, 1, 2}, np.arange(3), torch.zeros(2)): assert changed(with_value(same), with_value(same)) == []

def test_a_module_of_pytorch_is_its_class_tensors_and_parts():
    class Net(torch.nn.Module):
        def __init__(self, strength=1., weight=0.):
            super().__init__()
            self.strength, self.inner = strength, torch.nn.Linear(2, 2)
            with torch.no_grad(): self.inner.weight.fill_(weight); self.inner.bias.zero_()
        def forward(self, x): return self.inner(x)
    assert changed(code_of(Net()), code_of(Net())) == []
    hooked = Net()
    hooked.register_forward_hook(lambda *a: None)
    assert changed(code_of(Net()), code_of(hooked)) == [], 'hooks look, they do not compute'
    assert changed(code_of(Net()), code_of(Net(2.))) and changed(code_of(Net()), code_of(Net(1., 1.)))

def test_what_cannot_be_told_is_never_the_same(module, tmp_path):
    text = 'def root(): return 1\n'
    loaded = module(text, 'edited')
    space = {'__name__': '__main__'}
    exec('def root(): return 1', space)  # no text to be had
    assert changed(code_of(space['root']), code_of(space['root'])) == ['root']
    holds = module('import threading\nLOCK = threading.Lock()\ndef root(): return LOCK\n')
    assert changed(code_of(holds.root), code_of(holds.root)) == ['LOCK'] and 'cannot tell' in code_of(holds.root)['LOCK']
    assert changed(code_of(loaded.root), code_of(loaded.root)) == []

def test_a_file_edited_after_its_import_is_not_taken_for_what_runs(module, tmp_path):
    loaded = module('def root(): return 1\n', 'later')
    (tmp_path/'later.py').write_text('def root(): return 2\n')
    assert 'has changed since it was loaded' in code_of(loaded.root)['root']

def test_recursion_and_cycles_end(module):
    text = 'def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\nLOOP = []\nLOOP.append(LOOP)\ndef root(): return even(3), LOOP\n'
    assert set(code_of(module(text).root)) >= {'even', 'odd', 'root', 'LOOP'}

def test_libraries_are_not_followed():
    assert is_ours('cxr_lab.train') and is_ours('__main__') and is_ours(__name__)
    assert not any(map(is_ours, ('torch.nn', 'numpy', 'math', 'json', 'sys', 'builtins', 'no_such_module')))
    assert code_of(torch.nn.Linear, np.mean, json.dumps, len) == {}

def test_storing_and_scheduling_are_not_followed(module):
    text = 'from cxr_lab.runs import write_json\nfrom cxr_lab.cores import in_processes\ndef root(): return write_json, in_processes\n'
    assert set(code_of(module(text).root)) == {'root'}


# The trainings of the study

LIST = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cxr_lab import augment, kept, masked, model, train
assert kept.__file__.startswith(sys.argv[1])
print(json.dumps(kept.code_of(model.build_model, train.Classifier, train.fit, augment.Augment(), masked.look_at_all)))
"""

def listed(root):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', LIST, str(root)], env=env, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def functions(file):
    "Functions and methods of a module, as their qualified names have them."
    def inside(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef): yield prefix + node.name, node
            if isinstance(node, ast.ClassDef): yield from inside(node.body, f'{prefix}{node.name}.')
    return dict(inside(ast.parse(file.read_text()).body, ''))

@pytest.fixture(scope='module')
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp('package')
    shutil.copytree(REPO/'cxr_lab', root/'cxr_lab', ignore=shutil.ignore_patterns('__pycache__'))
    return root

def test_what_a_training_depends_on(package):
    found = listed(package)
    expected = {'SmallCNN.__init__', 'SmallCNN.forward', 'Classifier.training_step', 'Classifier.configure_optimizers', 'fit', '_average', 'kept_epoch',
                'make_loader', 'Augment.forward', 'move', 'expose', 'look', 'look_at_all', 'conv', 'Standardize.forward', 'to_float'}
    assert expected <= set(found) and not any('cannot tell' in v for v in found.values())
    assert not {'plot_test', 'run_experiments', 'write_json', 'layer_table', 'stress_test'} & set(found)

@pytest.mark.slow
def test_a_mutation_of_any_definition_that_a_training_uses_is_seen(package):
    "Each function and method on the list, one after the other, gets one more statement."
    before, tried = listed(package), 0
    for file in (package/'cxr_lab'/f'{name}.py' for name in ('augment', 'masked', 'model', 'train')):
        text = file.read_text()
        for name, node in functions(file).items():
            if name not in before: continue
            lines = text.splitlines(keepends=True)
            last = node.body[-1]
            one_line = last.lineno == node.lineno
            if one_line: lines[node.lineno - 1] = lines[node.lineno - 1].rstrip('\n') + '; mutated = 1\n'
            else: lines.insert(last.lineno - 1 if not getattr(last, 'decorator_list', []) else last.decorator_list[0].lineno - 1, ' ' * last.col_offset + 'mutated = 1\n')
            file.write_text(''.join(lines))
            try: assert name in changed(before, listed(package)), name
            finally: file.write_text(text)
            tried += 1
    assert tried >= 30

def test_moving_a_definition_to_another_module_changes_nothing(package, tmp_path):
    root = tmp_path/'moved'
    shutil.copytree(package, root)
    augment, model = root/'cxr_lab'/'augment.py', root/'cxr_lab'/'model.py'
    before, text = listed(root), augment.read_text()
    node = functions(augment)['move']
    lines = text.splitlines(keepends=True)
    moved = ''.join(lines[node.lineno - 1:node.end_lineno])
    del lines[node.lineno - 1:node.end_lineno]
    augment.write_text(''.join(lines).replace('from .model import', 'from .model import move,', 1))
    model.write_text(model.read_text() + '\nfrom torch.nn import functional as F\n' + moved)
    assert changed(before, listed(root)) == []
