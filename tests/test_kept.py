"Which changes make a result another one: every definition and value it uses, and nothing else."
import ast, functools, importlib.util, json, linecache, os, pickle, shutil, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_lab.kept import changed, code_of, code_of_cells, few, fresh_since, is_kept, is_ours, kept_from, only_since, put_aside, take_back
from cxr_lab.runs import versions

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

class Pickled:
    "Of a test below."

def test_being_pickled_changes_nothing():
    before = code_of(Pickled)
    pickle.dumps(Pickled())
    assert '__slotnames__' in vars(Pickled), 'what pickle notes in a class is not there: this tests nothing'
    assert code_of(Pickled) == before

def test_recursion_and_cycles_end(module):
    text = 'def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\nLOOP = []\nLOOP.append(LOOP)\ndef root(): return even(3), LOOP\n'
    assert set(code_of(module(text).root)) >= {'even', 'odd', 'root', 'LOOP'}

def test_libraries_are_not_followed():
    assert is_ours('cxr_lab.trainer') and is_ours('__main__') and is_ours(__name__)
    assert not any(map(is_ours, ('torch.nn', 'numpy', 'math', 'json', 'sys', 'builtins', 'no_such_module')))
    assert code_of(torch.nn.Linear, np.mean, json.dumps, len) == {}

def test_storing_and_scheduling_are_not_followed(module):
    text = 'from cxr_lab.runs import write_json\nfrom cxr_lab.cores import in_processes\ndef root(): return write_json, in_processes\n'
    assert set(code_of(module(text).root)) == {'root'}


def test_a_file_of_the_package_is_the_same_wherever_the_package_lies(monkeypatch):
    import cxr_lab
    def digest(path): return code_of({'path': path})
    ours, other = Path(cxr_lab.__file__).parent/'weights/lungs.keras', Path('/elsewhere/cxr_lab')
    here = digest(ours)
    assert here != digest(ours.with_suffix('.json')) and here != digest(Path('weights/lungs.keras'))
    monkeypatch.setattr(cxr_lab, '__file__', str(other/'__init__.py'))
    assert digest(other/'weights/lungs.keras') == here != digest(ours)
    monkeypatch.setattr(Path, '__repr__', lambda self: 'another')  # as fastcore does
    assert digest(other/'weights/lungs.keras') == here


# The trainings of the study

LIST = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cxr_lab import augment, kept, masked, train, trainer
assert kept.__file__.startswith(sys.argv[1])
print(json.dumps(kept.code_of(*train.PARTS.functions(), trainer.Classifier, trainer.fit, trainer.leave_results, augment.Augment(), masked.look_at_all)))
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
    expected = {'SmallCNN.__init__', 'SmallCNN.forward', 'Classifier.training_step', 'Classifier.configure_optimizers', 'fit', 'running_average', 'adamw', 'one_cycle', 'weighted_loss', 'judge', 'kept_epoch', 'predict',
                'make_loader', 'Augment.forward', 'move', 'expose', 'look', 'look_at_all', 'conv', 'Standardize.forward', 'to_float'}
    assert expected <= set(found) and not any('cannot tell' in v for v in found.values())
    assert not {'plot_test', 'run_experiments', 'write_json', 'layer_table', 'stress_test'} & set(found)

@pytest.mark.slow
@pytest.mark.integration
def test_a_mutation_of_any_definition_that_a_training_uses_is_seen(package):
    "Each function and method on the list, one after the other, gets one more statement."
    before, tried = listed(package), 0
    for file in (package/'cxr_lab'/f'{name}.py' for name in ('augment', 'masked', 'model', 'train', 'networks', 'trainer')):
        text = file.read_text()
        for name, node in functions(file).items():
            if name not in before: continue
            lines = text.splitlines(keepends=True)
            last = node.body[-1]
            one_line = last.lineno == node.lineno
            if one_line:  # behind the statement, not behind a comment that ends the line
                whole, end = lines[last.end_lineno - 1].encode(), last.end_col_offset  # counted in bytes
                lines[last.end_lineno - 1] = (whole[:end] + b'; mutated = 1' + whole[end:]).decode()
            else: lines.insert(last.lineno - 1 if not getattr(last, 'decorator_list', []) else last.decorator_list[0].lineno - 1, ' ' * last.col_offset + 'mutated = 1\n')
            file.write_text(''.join(lines))
            try: assert name in changed(before, listed(package)), name
            finally: file.write_text(text)
            tried += 1
    assert tried >= 30

def test_moving_a_definition_to_another_module_changes_nothing(package, tmp_path):
    root = tmp_path/'moved'
    shutil.copytree(package, root)
    augment, networks = root/'cxr_lab'/'augment.py', root/'cxr_lab'/'networks.py'
    before, text = listed(root), augment.read_text()
    node = functions(augment)['move']
    lines = text.splitlines(keepends=True)
    moved = ''.join(lines[node.lineno - 1:node.end_lineno])
    del lines[node.lineno - 1:node.end_lineno]
    augment.write_text(''.join(lines).replace('from .networks import', 'from .networks import move,', 1))
    networks.write_text(networks.read_text() + '\nfrom torch.nn import functional as F\n' + moved)
    assert changed(before, listed(root)) == []


# The cells of a notebook that has not run

CELLS = ['import json\nimport numpy as np', 'from elsewhere import helper, Model\nimport elsewhere as e', 'def local(x, by=2):\n    return by * helper(x)',
         'class Kind:\n    def say(self): return e.SCALE', 'def unused(): return 0', '"""A remark."""', 'total: int = local(1) + Kind().say()  # a comment', 'json.dumps(total)']
ELSEWHERE = 'SCALE = 3\ndef deeper(x): return x - 1\ndef helper(x): return deeper(x)\nclass Model:\n    width = 4\ndef other(): return 5\n'

@pytest.fixture
def of_cells(module, tmp_path, monkeypatch):
    "`of_cells(old, new)`: `code_of_cells` with a change in one of the cells, or in the module that they import."
    monkeypatch.syspath_prepend(tmp_path)
    def get(old='', new=''):
        module(ELSEWHERE.replace(old, new) if old else ELSEWHERE, 'elsewhere')
        linecache.checkcache()
        return code_of_cells([c.replace(old, new) if old else c for c in CELLS])[0]
    return get

@pytest.mark.parametrize('old, new, names', [
    ('by * helper', 'by + helper', ['local']), ('by=2', 'by=30', ['local', 'local default']), ('e.SCALE', 'e.SCALE + 1', ['Kind']),
    ('Kind().say()  #', 'Kind().say() - 1  #', ['cells']), ('SCALE = 3', 'SCALE = 31', ['SCALE']), ('return x - 1', 'return x - 20', ['deeper']),
    ('return deeper(x)', 'return -deeper(x)', ['helper']), ('json.dumps(total)', 'json.loads(total)', ['cells'])])
def test_a_change_in_what_cells_reach_is_seen(of_cells, old, new, names):
    assert changed(of_cells(), of_cells(old, new)) == names

@pytest.mark.parametrize('old, new', [
    ('  # a comment', ''), ('A remark.', 'Another remark.'), ('return 0', 'return 1'), ('return 5', 'return 55'), ('width = 4', 'width = 44'), ('total: int =', 'total ='),
    ('def local(x, by=2):\n', 'def local(x: float, by: int = 2) -> float:\n    "Twice."\n'), ('local(1) + Kind', 'local(1)  +  Kind'), ('import json\n', 'import json, math\n')])
def test_what_cells_do_not_reach_and_remarks_change_nothing(of_cells, old, new):
    assert changed(of_cells(), of_cells(old, new)) == []

def test_a_function_weighs_the_same_in_a_cell_and_in_a_module(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    function = 'def helper(x, by=2): return by * x\n'
    module(function, 'holds')
    assert changed(code_of_cells([function, 'helper(3)'])[0], code_of_cells(['from holds import helper', 'helper(3)'])[0]) == []

def test_a_module_that_is_used_as_a_whole_or_starred_is_followed_as_a_whole(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module(ELSEWHERE, 'elsewhere')
    assert {'SCALE', 'helper', 'other', 'Model'} <= set(code_of_cells(['import elsewhere', 'print(elsewhere)'])[0])
    assert set(code_of_cells(['from elsewhere import *', 'helper(1)'])[0]) == {'cells', 'helper', 'deeper'}

def test_cells_are_read_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'beside.py').write_text('def f(): return 1\n')
    code = code_of_cells(['import no_such_library', 'from beside import f', "open('made', 'w')", 'f()', 'raise SystemExit'])[0]
    assert set(code) == {'cells', 'f'} and not (tmp_path/'made').exists() and str(tmp_path) not in sys.path
    (tmp_path/'fails.py').write_text('1/0')
    one, two = (code_of_cells(['from fails import f', 'f()'])[0] for _ in 'ab')
    assert changed(one, two) == ['fails'] and 'ZeroDivisionError' in one['fails'], 'its notebook will tell'
    with pytest.raises(SyntaxError): code_of_cells(['def ('])

def test_another_library_under_the_same_name_is_seen():
    def of(line): return code_of_cells([line, 'f(1)'])[0]
    assert changed(of('from math import sin as f'), of('from math import cos as f')) == ['f'] and changed(of('from math import sin as f'), of('import os\nfrom math import sin as f')) == []

def test_strings_are_found_wherever_they_are_reached(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module('NAMES = {"a": ["from a value"]}\ndef f():\n    "A docstring."\n    return NAMES, f"{1} in a text"\ndef g(): return "not reached"\n', 'speaks')
    words = code_of_cells(['from speaks import f', '"""A remark."""', 'print(f(), "here")', 'def h(): return "nor this"'])[1]
    assert {'from a value', ' in a text', 'here', 'a'} <= words and not {'A docstring.', 'A remark.', 'not reached', 'nor this'} & words

KEYS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cxr_lab import pipeline, sweep
assert pipeline.__file__.startswith(sys.argv[1])
paths = pipeline.lessons(Path(sys.argv[1])/'nbs')
print(json.dumps([{p.stem: pipeline.step_key(p, {})['code'] for p in paths}, sweep.plan_sweep(data='phantom', nbs=Path(sys.argv[1])/'nbs').points[0].steps]))
"""

@pytest.mark.slow
def test_the_network_of_lesson_02_in_the_keys_of_all_lessons(package, tmp_path):
    "In a copied checkout, as a reader edits it: the default of a parameter counts, a comment and a docstring do not."
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    shutil.copytree(REPO/'nbs', tmp_path/'nbs')
    def keys():
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        done = subprocess.run([sys.executable, '-c', KEYS, str(tmp_path)], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    model = tmp_path/'cxr_lab'/'model.py'
    text, (codes, points) = model.read_text(), keys()
    start = text.index('class SmallCNN')
    model.write_text(text[:start] + '# A comment.\n\n' + text[start:].replace('"', '"Another docstring: ', 1))
    assert keys() == [codes, points]
    model.write_text(text[:start] + text[start:].replace('tuple = (16,', 'tuple = (32,', 1))
    assert model.read_text() != text
    now, moved = keys()
    assert all(any(k.startswith('SmallCNN') for k in changed(codes[s], now[s])) for s in ('03_train', '04_augment', '08_masked', '09_tsne'))
    assert codes['00_data'] == now['00_data'] and codes['01_explore'] == now['01_explore'] and codes['02_model'] == now['02_model'], '02 has it in its own cells'
    assert {s for s in points if points[s] == moved[s]} == {'00_data', '01_explore', '02_model', '07_segment'}


# Keeping

def test_what_counts_since_when(tmp_path):
    file = tmp_path/'metrics.json'
    assert not is_kept(file)
    file.touch()
    os.utime(file, (1000, 1000))
    assert is_kept(file) and not is_kept(file, fresh=True) and fresh_since() == 0
    with only_since(1000): assert is_kept(file)
    with only_since(1001):
        assert not is_kept(file)
        with only_since(0): assert fresh_since() == 1001, 'what is asked for outside holds inside'
        seen = subprocess.run([sys.executable, '-c', 'from cxr_lab.kept import fresh_since; print(fresh_since())'], capture_output=True, text=True, cwd=REPO)
        assert float(seen.stdout) == 1001, 'and in other processes'
    assert is_kept(file) and 'CXR_LAB_FRESH' not in os.environ

def test_what_is_said_of_kept_results(tmp_path, monkeypatch):
    monkeypatch.setenv('TZ', 'UTC')
    time.tzset()
    for i, moment in enumerate((1795615380, 1795000000)):
        (tmp_path/str(i)).touch()
        os.utime(tmp_path/str(i), (moment, moment))
    assert kept_from(tmp_path/'0', tmp_path/'1') == 'kept from 2026-11-25 14:03: same images, parameters and code'
    now = versions()
    assert kept_from(tmp_path/'0', made_with=now) == kept_from(tmp_path/'0')
    assert kept_from(tmp_path/'0', made_with=now | {'numpy': '0.1', 'gone': '2'}).endswith(f'code (made with numpy 0.1, now {now["numpy"]})')

def test_results_with_a_recipe_are_put_aside_and_taken_back(tmp_path):
    for place in ('seed_0', 'a/b/seed_1'):
        (tmp_path/place).mkdir(parents=True)
        (tmp_path/place/'recipe.json').write_text(place)
    (tmp_path/'a/other.txt').touch()
    put_aside(tmp_path)
    put_aside(tmp_path)  # what is aside stays there
    assert not (tmp_path/'seed_0').exists() and not (tmp_path/'a/b/seed_1').exists() and (tmp_path/'a/other.txt').exists()
    take_back(tmp_path, 'a/b/seed_1'), take_back(tmp_path, 'never')
    assert (tmp_path/'a/b/seed_1/recipe.json').read_text() == 'a/b/seed_1' and not (tmp_path/'seed_0').exists() and not (tmp_path/'never').exists()
    (tmp_path/'seed_0').mkdir()
    take_back(tmp_path, 'seed_0')
    assert not list((tmp_path/'seed_0').iterdir()), 'a newer one stands'

def test_long_lists_are_cut():
    assert few(['a']) == 'a' and few(list('abcd')) == 'a, b, c, d' and few(list('abcde')) == 'a, b, c, d ...'
