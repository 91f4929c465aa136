"What is installed: floors, optional parts, and what is said where one is missing."
import ast, importlib.util, os, subprocess, sys
from importlib.metadata import packages_distributions, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from cxr_lab.cli import app
from cxr_lab.runs import optional


@pytest.fixture(scope='module')
def floors(repo):
    "The script .ci/floors.py, as a module."
    spec = importlib.util.spec_from_file_location('floors', repo/'.ci/floors.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def extras(repo, tmp_path_factory):
    "What setup.py tells pip: the part ('' is the base) -> requirements."
    folder = tmp_path_factory.mktemp('egg')
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '-e', str(folder)]
    subprocess.run(command, cwd=repo, check=True, capture_output=True)
    parts, part = {'': []}, ''
    for line in (folder/'cxr_lab.egg-info/requires.txt').read_text().split():
        if line.startswith('['): part = line.strip('[]')
        else: parts.setdefault(part, []).append(Requirement(line))
    return parts

def names(requirements): return {r.name.lower().replace('_', '-') for r in requirements}

def test_floors_are_pins(floors):
    settings = dict(requirements='numpy>=2.0 torch>=2.8', sweep_requirements='bokeh>=3.6.2',
                    app_requirements='', onnx_requirements='onnx>=1.23',
                    dev_requirements='pytest>=8.2 fastcore<2')
    assert floors.floors(settings) == ['numpy==2.0', 'torch==2.8', 'bokeh==3.6.2', 'onnx==1.23',
                                       'pytest>=8.2', 'fastcore<2']
    for wrong in ('numpy', 'numpy==2.0', 'numpy>=2.0,<3'):
        with pytest.raises(ValueError, match='expected NAME>=VERSION'):
            floors.floors(settings | {'requirements': wrong})

def test_the_floors_of_the_package_are_below_what_is_installed(floors, repo):
    command = [sys.executable, '.ci/floors.py']
    done = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True)
    pins = [Requirement(line) for line in done.stdout.split()]
    assert {'numpy', 'torch', 'distributed', 'starlette', 'onnx', 'pytest'} <= names(pins)
    pinned = {p.name: next(iter(p.specifier)) for p in pins}
    assert pinned['torch'].operator == '=='
    assert Version(pinned['torch'].version) <= Version(version('torch'))

def test_whoever_develops_gets_all_parts(extras):
    assert names(extras['sweep']) == {'distributed', 'bokeh'}
    assert names(extras['app']) == {'starlette', 'uvicorn', 'anyio'}
    assert names(extras['onnx']) == {'onnx', 'onnxscript'}
    for part in ('sweep', 'app', 'onnx'):
        assert set(map(str, extras[part])) <= set(map(str, extras['dev']))
        assert not names(extras[part]) & names(extras[''])

def test_everything_that_is_imported_is_required(repo, extras):
    "By the base, or by a part that the module names when something is missing."
    owners = packages_distributions()
    brought = {'jupyter-client': 'ipykernel', 'ipython': 'ipykernel', 'dask': 'distributed'}
    for path in sorted((repo/'cxr_lab').glob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        parts = [n.args[0].value for n in calls if getattr(n.func, 'id', '') == 'optional']
        allowed = names(extras['']).union(*(names(extras[part]) for part in parts))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): found = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: found = [node.module]
            else: continue
            modules = {f.split('.')[0] for f in found}
            for module in modules - set(sys.stdlib_module_names) - {'cxr_lab'}:
                homes = {d.lower().replace('_', '-') for d in owners[module]}
                known = {brought.get(h, h) for h in homes} & allowed
                assert known, f'{path.name} imports {module}, of {homes}'

def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bokeh', None)
    said = r"^bokeh is not installed; .*pip install 'cxr_lab\[sweep\]'$"
    with pytest.raises(RuntimeError, match=said):
        with optional('sweep'): import bokeh  # noqa: F401
    with pytest.raises(ZeroDivisionError):
        with optional('sweep'): 1/0

@pytest.mark.parametrize('missing, part, command', [
    ('distributed', 'sweep', ['sweep', '00_data', '--out', 'swept']),
    ('starlette.applications', 'app', ['app', '--no-browser']),
    ('uvicorn', 'app', ['app', '--no-browser']), ('anyio', 'app', ['app', '--no-browser']),
    ('onnxscript', 'onnx', ['export', 'm.onnx'])])
def test_a_command_says_in_one_line_what_it_lacks(missing, part, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and result.stdout == ''
    assert result.stderr == (f'cxr-lab: {missing} is not installed; it comes with an optional part '
                             f"of cxr_lab: pip install 'cxr_lab[{part}]'\n")
    assert os.listdir() == [], 'nothing was begun'

def test_all_modules_are_imported_with_every_part_out_of_reach(repo, tmp_path):
    modules = [path.stem for path in sorted((repo/'cxr_lab').glob('[a-z]*.py'))]
    parts = ('distributed', 'dask', 'bokeh', 'starlette', 'uvicorn', 'onnx', 'onnxscript')
    code = f'''import importlib, sys
for name in {parts!r}: sys.modules[name] = None
for name in {modules!r}: importlib.import_module('cxr_lab.' + name)'''
    command, env = [sys.executable, '-c', code], os.environ | {'PYTHONPATH': str(repo)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
