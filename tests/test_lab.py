"The notebooks of nbs/lab run from top to bottom: their checks hold, and they say nothing on stderr."
import os
from pathlib import Path

import papermill
import pytest

REPO = Path(__file__).resolve().parent.parent
LAB = {path.stem: path for path in sorted((REPO/'nbs'/'lab').glob('*.ipynb'))}
SLOW = {  # what takes more than 20 seconds of processor time, and why
    'predict': 'draws 296 phantoms, trains on them, answers about folders of films',
    'reference': 'saves and opens the published network (5 million weights at 256 pixels), and asks it',
    'sweep': 'four sweeps, and a kernel for each of their steps',
    'unusual': 'draws 240 phantoms, learns what is usual, and asks it about ten kinds of images',
}

def test_what_is_slow_is_there(): assert set(SLOW) <= set(LAB)

@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
                                  for name in LAB])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    "In a kernel with this checkout, in its own folder, as in JupyterLab."
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))
    monkeypatch.setenv('PYTHONPATH', path)
    monkeypatch.setenv('TMPDIR', str(tmp_path))  # where the demonstrations write
    nb = papermill.execute_notebook(LAB[name], tmp_path/f'{name}.ipynb', kernel_name='python3',
                                    cwd=LAB[name].parent, progress_bar=False)
    said = [o.text for c in nb.cells for o in c.get('outputs', []) if o.get('name') == 'stderr']
    assert said == []
    assert all(c.execution_count for c in nb.cells if c.cell_type == 'code' and c.source.strip())
