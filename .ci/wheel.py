"A wheel holds the lessons, and its modules need neither development tools nor optional parts to be imported, and import nbdev only to export: `python .ci/wheel.py WHEEL`."
import json, subprocess, sys, tempfile
from pathlib import Path
from zipfile import ZipFile

# development tools and the packages of the extras
hidden = ('pytest', 'smalldocs', 'distributed', 'bokeh', 'starlette', 'uvicorn', 'onnx',
          'onnxscript')
wheel, lessons = Path(sys.argv[1]), sorted(Path('nbs').glob('[0-9][0-9]_*.ipynb'))
with ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
    held = {name: archive.read(name) for name in archive.namelist() if name.startswith('cxr_lab/notebooks/')}
    assert set(held) == {f'cxr_lab/notebooks/{path.name}' for path in lessons}, f'the wheel holds {sorted(held)}'
    for name, text in held.items():
        assert not any(cell.get('outputs') for cell in json.loads(text)['cells']), f'{name} has outputs'
    templates = {f'cxr_lab/templates/{path.name}' for path in Path('cxr_lab/templates').iterdir()}
    assert templates <= set(archive.namelist()), 'the wheel lacks cxr_lab/templates'
    assert not [name for name in archive.namelist() if name.split('/')[0] in ('tests', 'benchmarks', 'nbs')], 'the wheel holds more than the package'
    archive.extractall(folder)
    modules = [name[:-3].replace('/', '.') for name in archive.namelist() if name.startswith('cxr_lab/') and name.endswith('.py') and not name.endswith('_modidx.py')]
    script = f"""
import importlib, sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    "Finds nothing of these: as where they are not installed, for `find_spec` (torch asks it about onnx) and for `import`."
    hidden = {hidden!r}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] in cls.hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.path.insert(0, {folder!r})
for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))
import cxr_lab
assert cxr_lab.__file__.startswith({folder!r}), cxr_lab.__file__
from cxr_lab.pipeline import lessons
assert len(lessons()) == {len(lessons)}, lessons()
assert 'tensorflow' not in sys.modules, 'TensorFlow is imported where it is not needed'
assert not set({hidden!r}) & set(sys.modules), sorted(set({hidden!r}) & set(sys.modules))
assert 'nbdev' not in sys.modules, 'nbdev is imported where nothing is exported'
try: import pytest
except ModuleNotFoundError: pass
else: raise AssertionError('pytest can be imported: this check hides nothing')
"""
    subprocess.run([sys.executable, '-I', '-c', script], cwd=folder, check=True)
print(f'{wheel.name}: {len(held)} lessons, {len(modules)} modules, {wheel.stat().st_size/1e6:.2f} MB')
