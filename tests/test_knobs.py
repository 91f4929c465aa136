"What can be set in a lesson: read from its parameter cell, checked by the pipeline and by the lesson itself."
import subprocess, sys
from pathlib import Path

import nbformat
import pytest

from cxr_lab.knobs import Knob, check_knobs, read_knobs, typed

REPO = Path(__file__).resolve().parent.parent
LESSONS = sorted((REPO/'nbs').glob('[0-9][0-9]_*.ipynb'))
CELL = '''run_dir: str = 'runs/default'  # run folder
epochs: int = 8                # passes over the images (>= 1)
lr: float = 3e-3               # highest learning rate (> 0)
share: float = .15             # of the images (> 0, <= 0.5)
images: int = 0                # to look at (>= 0); 0: all
seeds: int = 3                 # how many (if > 5: slow)
augment: bool = False
mask: int | None = None        # which (>= 2)'''

def kernel(cells=(), **values):
    "What a kernel's globals hold after these cells: the parameter cell's values, some of them replaced."
    space = {'In': ['', '#| default_exp train', CELL, *cells, 'check_knobs(globals())']}
    return space | {name: knob.default for name, knob in read_knobs(CELL).items()} | values

def injected(**values):
    "The cell that papermill puts behind the parameter cell."
    from papermill.translators import PythonTranslator
    return PythonTranslator.codify(values)


def test_ranges_are_read_from_comments_in_parentheses():
    ranges = {k.name: k.range for k in read_knobs(CELL).values()}
    assert ranges == dict(run_dir='', epochs='>= 1', lr='> 0', share='> 0, <= 0.5', images='>= 0',
                          seeds='', augment='', mask='>= 2')

@pytest.mark.parametrize('value', ['two', '8', 1.5, 2.0, True, [48], None, -1, 0, float('nan')])
def test_a_count_is_a_whole_number_from_one(value):
    with pytest.raises(ValueError) as e: check_knobs(kernel([injected(epochs=value)], epochs=value))
    assert str(e.value) == f'epochs: expected int >= 1, found {value!r}'

@pytest.mark.parametrize('name, value, expected', [
    ('lr', 0, 'float > 0'), ('lr', True, 'float > 0'), ('lr', float('inf'), 'float > 0'),
    ('share', .51, 'float > 0, <= 0.5'), ('images', -1, 'int >= 0'), ('augment', 1, 'bool'),
    ('augment', 'true', 'bool'), ('seeds', True, 'int'), ('run_dir', 5, 'str'), ('mask', 1, 'int | None >= 2')])
def test_what_a_knob_does_not_take_is_refused(name, value, expected):
    with pytest.raises(ValueError) as e: check_knobs(kernel([injected(**{name: value})], **{name: value}))
    assert str(e.value) == f'{name}: expected {expected}, found {value!r}'

@pytest.mark.parametrize('given', [
    {}, dict(epochs=1), dict(lr=1), dict(share=.5), dict(images=0), dict(augment=True), dict(seeds=-1),
    dict(mask=2), dict(mask=None), dict(run_dir='runs/x', epochs=3)])
def test_what_a_knob_takes_passes(given): check_knobs(kernel([injected(**given)] if given else [], **given))

def test_an_injected_name_that_the_lesson_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"^epoch: no parameter of this lesson \(did you mean 'epochs'\?\); "
                                         r'it has epochs: int = 8, lr: .*augment: bool = False, mask'):
        check_knobs(kernel([injected(run_dir='r', epoch=3)], epoch=3))
    check_knobs(kernel([injected(PAPERMILL_INPUT_PATH='a.ipynb')]))  # of papermill's --inject-paths
    check_knobs(kernel(['epoch = 3'], epoch=3))  # a cell of the reader's own

def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError) as e: check_knobs(kernel([injected(ep=1, lr=0)], lr=0, epochs=0))
    assert [line.split(':')[0] for line in str(e.value).splitlines()] == ['ep', 'epochs', 'lr']

def test_the_parameter_cell_that_counts_is_the_last_one():
    "Who edits the cell in JupyterLab and runs it again is checked by what it says now."
    space = kernel([injected(epoch=3), CELL.replace('epochs: int', 'epoch: int'), injected(epoch=4)], epoch=4)
    check_knobs(space)
    with pytest.raises(ValueError, match='epoch: expected int >= 1, found 0'): check_knobs(space | {'epoch': 0})

def test_a_kernel_without_the_parameter_cell_is_told_to_run_it():
    with pytest.raises(RuntimeError, match='run it first'): check_knobs({'In': ['', 'check_knobs(globals())']})
    check_knobs({'In': ['']})  # no history is kept: nobody injects anything

def test_text_spells_a_value_only_where_it_comes_as_text():
    knob = Knob('epochs', 'int', 8)
    assert knob.check('8') == 8 and typed('[1, 2]', 'list[int]') == [1, 2]
    with pytest.raises(ValueError, match="expected int, found '8'"): knob.check('8', text=False)
    with pytest.raises(ValueError): typed('[1, 2]', 'list[int]', text=False)

def test_the_module_is_light():
    "It comes before everything else in a lesson, so that a wrong value is refused at once."
    code = 'import sys; before = set(sys.modules); import cxr_lab.knobs; print(*set(sys.modules) - before)'
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, capture_output=True, text=True, check=True)
    ours = {name.split('.')[0] for name in done.stdout.split()}
    assert ours <= {'cxr_lab', *sys.stdlib_module_names}, ours


# In the lessons

def code_of(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']

@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_a_lesson_checks_its_parameters_before_it_imports_anything(path):
    cells = code_of(path)
    at = next(i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', []))
    assert [c.source for c in cells[:at]] == [f'#| default_exp {path.stem[3:]}']
    assert cells[at + 1].source == 'from cxr_lab.knobs import check_knobs\n\ncheck_knobs(globals())'
    space = {'In': ['', *(c.source for c in cells[:at + 2])]}
    exec(cells[at].source, space)
    exec(cells[at + 1].source, space)  # the defaults pass
    knobs = read_knobs(cells[at].source)
    numbers = [k for k in knobs.values() if k.type in ('int', 'float')]
    for knob in numbers:
        assert knob.range.startswith('>'), f'{path.stem}: the comment of {knob.name} gives no least value'
        with pytest.raises(ValueError, match=f'^{knob.name}: expected {knob.type} >'):
            exec(cells[at + 1].source, space | {knob.name: -1})

@pytest.mark.parametrize('given, said', [
    (dict(epochs='two'), "epochs: expected int >= 1, found 'two'"),
    (dict(epoch=3), r"epoch: no parameter of this lesson \(did you mean 'epochs'\?\)")])
def test_bare_papermill_is_as_safe(tmp_path, monkeypatch, given, said):
    import papermill
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        papermill.execute_notebook(REPO/'nbs'/'03_train.ipynb', 'out.ipynb', given, progress_bar=False, kernel_name='python3')
    ran = [c for c in code_of('out.ipynb') if c.execution_count]
    assert 'check_knobs' in ran[-1].source and [p.name for p in tmp_path.iterdir()] == ['out.ipynb']
