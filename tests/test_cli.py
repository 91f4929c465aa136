"Exit codes and messages."
import os, signal, subprocess, sys, time, types
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import cxr_lab
from cxr_lab.cli import app
from cxr_lab.runs import read_json, write_json


def cli(*args):
    result = CliRunner().invoke(app, args, prog_name='cxr-lab')
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    return result

def process(*args, **kwargs):
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(cxr_lab.__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}
    code = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cxr_lab.cli import main; main()'
    return subprocess.run([sys.executable, '-c', code, *args], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, **kwargs)

@pytest.fixture
def nbs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('nbs').mkdir()
    cells = [nbformat.v4.new_code_cell("run_dir: str = 'runs/default'\ndata: str = 'phantom'\nname: str = 'x'\nn: int = 1", metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell("#| fig-alt: 'none'\n# wait\nimport os, signal, time\nif name == 'stop': os.kill(os.getppid(), signal.SIGINT); time.sleep(3600)"),
             nbformat.v4.new_code_cell("print(name)\n1/n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), 'nbs/00_data.ipynb')


def test_run_succeeds(nbs):
    result = cli('run', '--nbs', 'nbs', '-p', 'name=a=b=', '-p', '00_data.n=2', '--run-dir', 'runs/ü')
    assert result.exit_code == 0 and result.stdout == 'results: runs/ü/results.json\nopen runs/ü/index.html\n'
    assert Path('runs/ü/index.html').is_file()
    assert read_json('runs/ü/00_data/status.json')['parameters'] == {'data': 'phantom', 'name': 'a=b=', 'n': 2}

def test_run_fails_with_1_and_resumes(nbs):
    result = cli('run', '--nbs', 'nbs', '-p', 'n=0')
    assert result.exit_code == 1 and result.stdout == ''
    for part in ['00_data failed in cell [4] `print(name)`', 'ZeroDivisionError: division by zero', 'runs/default/00_data/00_data.partial.ipynb', '--resume']: assert part in result.stderr
    assert 'Traceback' not in result.output
    assert cli('run', '--nbs', 'nbs', '-p', 'n=3', '--resume').exit_code == 0

@pytest.mark.parametrize('args,part', [
    (['-p', 'm=1'], "unknown parameter 'm'"), (['-p', 'n=one'], 'n: expected int, found'), (['-p', 'n'], 'expected name=value'), (['-p', '=1'], 'expected name=value'), (['07'], 'known: 00_data'),
    (['--data', 'no/such/folder'], 'no data set and no folder'), (['--bogus'], 'No such option'), (['-p', '03.n=1'], 'unknown notebook'), (['--nbs', 'none'], 'no notebooks')])
def test_usage_errors_exit_with_2_and_start_nothing(nbs, args, part):
    result = cli('run', '--nbs', 'nbs', *args)
    assert result.exit_code == 2 and part in result.stderr and result.stdout == '' and not Path('runs').exists()

def test_known_parameters_are_listed(nbs):
    assert "00_data: data: str = 'phantom', name: str = 'x', n: int = 1" in cli('run', '--nbs', 'nbs', '-p', 'm=1').stderr

@pytest.mark.skipif(os.name == 'nt', reason='the test sends a POSIX signal')
def test_interrupted_exits_with_130(nbs):
    done = process('run', '--nbs', 'nbs', '-p', 'name=stop')  # does not wait for the cell, which takes an hour
    assert done.returncode == 130
    assert 'cxr-lab: 00_data was interrupted in cell [3] `import os, signal, time`' in done.stderr
    assert 'Traceback' not in done.stderr and 'runs/default/00_data/00_data.partial.ipynb' in done.stderr
    assert Path('runs/default/00_data/00_data.partial.ipynb').exists() and not Path('runs/default/00_data/status.json').exists()

def test_corrupted_run_is_one_message(nbs):
    write_json('runs/default/pipeline.json', {}); Path('runs/default/pipeline.json').write_text('{')
    result = cli('run', '--nbs', 'nbs', '--resume')
    assert result.exit_code == 1 and 'pipeline.json is not valid JSON' in result.stderr and 'Traceback' not in result.output

def test_bugs_keep_their_traceback(monkeypatch):
    from cxr_lab import report
    monkeypatch.setattr(report, 'runs_table', lambda runs: 1/0)
    with pytest.raises(ZeroDivisionError): cli('table', 'x')

def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = dict(recall=.5, precision=.5, accuracy=.5, f1=.5, specificity=.5, balanced_accuracy=.5, auroc=None, n=10)
    for name, lr in [('a', .1), ('b', .2)]:
        rows = [dict(experiment='baseline', seed=s, threshold_rule='0.5', threshold=.5) | metrics for s in (0, 1)]
        write_json(f'{name}/results.json', {'provenance': {'parameters': {'03_train': {'lr': lr, 'epochs': 8}}, 'data': 'phantom', 'dataset': None}, 'rows': rows})
    result = cli('table', 'a', 'b', '--csv', 'out/t.csv')
    assert result.exit_code == 0 and '03_train.lr' in result.stdout and '03_train.epochs' not in result.stdout
    lines = Path('out/t.csv').read_text().splitlines()
    assert lines[0].startswith('run,03_train.lr,experiment,threshold_rule,seeds,recall') and lines[1].startswith('a,0.1,baseline,0.5,2,0.5') and len(lines) == 3
    assert cli('table', 'a', 'c').exit_code == 2
    assert cli('table').exit_code == 2

def test_fetch(monkeypatch):
    fake = types.ModuleType('cxr_lab.images')
    fake.fetch = lambda name: Path('cache')/name
    monkeypatch.setitem(sys.modules, 'cxr_lab.images', fake); monkeypatch.setattr(cxr_lab, 'images', fake, raising=False)
    assert cli('fetch').stdout == 'cache/kermany\n' and cli('fetch', 'pneumoniamnist').stdout == 'cache/pneumoniamnist\n'
    def offline(name): raise ConnectionError('no network')
    fake.fetch = offline
    result = cli('fetch')
    assert result.exit_code == 1 and result.stderr == 'cxr-lab: no network\n'
    assert cli('fetch', 'cats').exit_code == 2

def test_publish_refuses_clearly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli('publish', 'none').exit_code == 2
    Path('run').mkdir(); Path('nbs').mkdir()
    result = cli('publish', 'run')
    assert result.exit_code == 1 and 'has no completed notebook' in result.stderr

def test_the_version_is_told(): assert cli('--version').stdout == f'cxr-lab {cxr_lab.__version__}\n'

@pytest.fixture
def films(tmp_path, monkeypatch):
    "Two phantoms and a text file that is named like an image."
    import cv2
    from cxr_lab.phantom import make_phantom
    monkeypatch.chdir(tmp_path)
    Path('films').mkdir()
    for label in (0, 1): cv2.imwrite(f'films/{label}.png', make_phantom(label, label, 128).image)
    Path('films/notes.jpeg').write_text('no image')

def test_predict_writes_answers_and_a_report(films):
    import pandas as pd
    result = cli('predict', 'films', '--out', 'out', '--threshold', '0.5')
    assert result.exit_code == 0 and 'read 2, unreadable 1' in result.stdout and 'report: out/report.html' in result.stdout
    table = pd.read_csv('out/predictions.csv', keep_default_na=False)
    assert [Path(p).name for p in table.path] == ['0.png', '1.png', 'notes.jpeg'] and list(table.error != '') == [False, False, True]
    assert (table.label[:2] == ['PNEUMONIA' if float(p) >= .5 else 'NORMAL' for p in table.probability[:2]]).all()
    assert 'notes.jpeg' in Path('out/report.html').read_text() and len(list(Path('out/heatmaps').glob('*.png'))) == 2
    strict = cli('predict', 'films', '--out', 'out', '--threshold', '0.5', '--resume', '--strict')
    assert strict.exit_code == 1 and 'cxr-lab:' not in strict.stderr, 'one file is no image'
    other = cli('predict', 'films', '--out', 'out', '--threshold', '0.6', '--resume')
    assert other.exit_code == 1 and 'threshold' in other.stderr, 'answers of two thresholds do not go into one table'

def test_predict_fails_if_nothing_can_be_read(films):
    assert cli('predict', 'films/notes.jpeg', '--out', 'out', '--no-heatmaps').exit_code == 1
    assert cli('predict', 'films/0.png', '--out', 'out2', '--no-heatmaps', '--strict').exit_code == 0 and not Path('out2/heatmaps').exists()
    missing = cli('predict', 'films', '--model', 'none.safetensors', '--out', 'out3')
    assert missing.exit_code == 1 and "'none.safetensors'" in missing.stderr and not Path('out3').exists()
    assert cli('predict', 'films', '--threshold', '2', '--out', 'out3').exit_code == 1 and not Path('out3').exists()

def test_usual_tells_what_it_wrote_or_why_not(films, monkeypatch):
    from cxr_lab import predict
    asked = []
    monkeypatch.setattr(predict, 'learn_usual', lambda model: asked.append(model) or Path('runs/r/model.usual.safetensors'))
    assert cli('usual', 'runs/r').stdout == 'runs/r/model.usual.safetensors\n' and asked == ['runs/r']
    monkeypatch.undo()
    result = cli('usual', 'runs/none')
    assert result.exit_code == 1 and "'none'" in result.stderr and result.stdout == ''

def test_predict_says_if_it_cannot_warn(films):
    from cxr_lab.model import build_model
    from cxr_lab.networks import save_model
    assert 'cannot tell unusual images' not in cli('predict', 'films', '--out', 'o1', '--no-heatmaps').stderr
    save_model(Path('m.safetensors'), build_model('small'), dict(model='small', image_size=32, aspect='stretch', threshold=.5))
    assert 'm.safetensors cannot tell unusual images' in cli('predict', 'films', '--model', 'm.safetensors', '--out', 'o2', '--no-heatmaps').stderr

def test_export_writes_onnx(films):
    onnx = pytest.importorskip('onnx')
    assert cli('export', 'm.onnx').exit_code == 0
    assert [i.name for i in onnx.load('m.onnx').graph.input] == ['pixels']

def test_sweep_plans_without_running(nbs):
    result = cli('sweep', '--nbs', 'nbs', '-p', 'n=1,2', '-p', 'name=a,b', '--dry-run', '--out', 'runs/s')
    assert result.exit_code == 0 and '4' in result.stdout and not Path('runs/s').exists()
    assert cli('sweep', '--nbs', 'nbs', '-p', 'm=1,2', '--dry-run').exit_code == 2
    assert cli('sweep', '--nbs', 'nbs', '-p', 'n=1,2', '--workers', '1', '--scheduler', 'tcp://127.0.0.1:1').exit_code == 2
