"Nothing is imported before it is needed: what a command brings into a fresh process."
import os, subprocess, sys
from pathlib import Path

import pytest

import cxr_lab

HEAVY = (
    'pytorch_lightning', 'lightning', 'torchmetrics', 'torchvision', 'torch._dynamo', 'seaborn',
    'matplotlib.pyplot', 'sklearn', 'scipy.stats', 'h5py', 'requests', 'pooch', 'IPython', 'keras',
    'tensorflow', 'distributed')

def brought(code, names, folder='.'):
    "Which of some modules a fresh process has imported after running the code."
    code += f'\nimport sys; print(*[m for m in {tuple(names)!r} if m in sys.modules])'
    env = os.environ | {'PYTHONPATH': str(Path(cxr_lab.__file__).parent.parent)}
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()

def test_the_command_line_starts_without_any_science():
    names = ('torch', 'pandas', 'numpy', 'papermill', 'nbformat', 'tensorflow')
    assert brought('import cxr_lab.cli', names) == []
    assert brought('import cxr_lab.runs', names) == ['pandas', 'numpy']

@pytest.mark.parametrize('module', ['predict', 'pages', 'webapp'])
def test_answering_for_films_imports_pytorch_and_nothing_that_training_needs(module):
    names = ('torch', 'scipy', 'matplotlib', *HEAVY)
    assert brought(f'import cxr_lab.{module}', names) == ['torch']

def test_one_film_is_answered_without_what_training_needs(tmp_path):
    import cv2
    from cxr_lab.phantom import make_phantom
    cv2.imwrite(str(tmp_path/'one.jpeg'), make_phantom(1, 0, 128).image)
    code = "from cxr_lab.cli import app; app(['predict', 'one.jpeg'], standalone_mode=False)"
    assert brought(code, ('torch', *HEAVY), tmp_path) == ['torch']
    assert (tmp_path/'predictions/report.html').is_file()

def test_a_network_of_torchvision_is_found_when_it_is_asked_for():
    small = "from cxr_lab.model import build_model; build_model('small')"
    assert brought(small, ('torchvision',)) == []
    assert brought(small + "; build_model('resnet18')", ('torchvision',)) == ['torchvision']

def test_what_the_package_offers_is_imported_when_it_is_asked_for():
    heavy = ('torch', 'pandas', 'numpy', 'papermill', 'nbformat', *HEAVY)
    assert brought('import cxr_lab; dir(cxr_lab)', heavy) == []
    assert brought('from cxr_lab import intervals', ('torch', *HEAVY)) == []
    assert {'Predictor', 'GradCAM', 'load_dataset', 'predict_files', 'intervals'} <= set(dir(cxr_lab))
    for name in cxr_lab.__all__: assert getattr(cxr_lab, name) is not None
    from cxr_lab.predict import Predictor
    assert cxr_lab.Predictor is Predictor
    with pytest.raises(AttributeError, match="'cxr_lab' has no attribute 'predictor'"): cxr_lab.predictor
    with pytest.raises(ImportError, match="cannot import name 'nothing'"): from cxr_lab import nothing
