"What is written of many films: a table for anybody, heatmaps, and runs that end early."
import csv, io, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from cxr_lab import answers as A
from cxr_lab import predict as P
from cxr_lab.runs import read_json, write_json
from predictors import films, model, network, predictor, saved

# --- the table

NAMES = ['plain.png', '=cmd|\'/c calc\'!A1', '+1', '-2', '@SUM(A1)', '\tx', '\rx', '\n=x', "'=x", "''", 'a,b;"c"', 'two\nlines', 'mac\rline', os.fsdecode(b'caf\xe9\xff'), r'C:\udce9\u005c', '\\', r'\u005cudce9', '＝1', '日本.png', '']

def test_cells_can_be_undone():
    rng = np.random.default_rng(0)
    letters = list("=+-@'\\ud0ce95\t\r\n\",;aé\udce9\udcff\ud800")
    for text in NAMES + [''.join(rng.choice(letters, rng.integers(0, 12))) for _ in range(3000)]:
        cell = A.to_cell(text)
        assert A.from_cell(cell) == text and not cell.startswith(('=', '+', '-', '@', '\t', '\r', '\n', '＝')), repr(text)
        cell.encode('utf-8')

def test_the_table_is_readable_by_others(tmp_path):
    rows = [[name, 'NORMAL', '0.25', '0.5', '', '', '', '', ''] for name in NAMES]
    table = A._Table(tmp_path/'t.csv', [])
    table.append(rows); table.file.close()
    ours, theirs = A.read_table(tmp_path/'t.csv'), pd.read_csv(tmp_path/'t.csv', keep_default_na=False)
    assert ours.path.tolist() == NAMES and theirs.probability.tolist() == [.25] * len(NAMES) == ours.probability.tolist()
    assert theirs.path[0] == NAMES[0] and list(theirs) == list(A.COLUMNS)

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows forbids such names')
def test_hostile_names_from_end_to_end(tmp_path, predictor, films, monkeypatch):
    names = [n for n in NAMES if n and '/' not in n] + ['=calc().jpeg', '<b>&amp;.jpeg']
    folder = tmp_path/'in'
    folder.mkdir()
    for name in names: shutil.copy(films/'a'/'film 0.jpeg', folder/name)
    told = A.predict_files(predictor, [folder/n for n in names], tmp_path/'out', batch_size=5)
    table = A.read_table(tmp_path/'out'/'predictions.csv')
    assert table.path.tolist() == [str(folder/n) for n in names] and table.heatmap.nunique() == len(names) == told['counts']['read']
    for h in table.heatmap: Image.open(tmp_path/'out'/h).verify()
    monkeypatch.chdir(folder)
    relative = [n for n in names if n[0] != '\n']
    A.predict_files(predictor, relative, tmp_path/'relative', heatmaps=False)
    with open(tmp_path/'relative'/'predictions.csv', newline='', encoding='utf-8') as f:
        assert not any(cell.startswith(('=', '+', '-', '@', '\t', '\r')) for row in csv.reader(f) for cell in row)
    assert A.read_table(tmp_path/'relative'/'predictions.csv').path.tolist() == relative

def test_heatmap_names():
    paths = ['a/x.jpeg', 'b/x.jpeg', 'a/x.png', 'a/X.jpeg', 'x' * 300, '../../etc/passwd', '.png', os.fsdecode(b'\xff'), '<i>.png', 'CON']
    names = [A.heatmap_name(p) for p in paths]
    assert len({n.lower() for n in names}) == len(paths) and names == [A.heatmap_name(p) for p in paths]
    assert all(len(n) < 70 and n.endswith('.png') and n[0] not in '.-' and all(c.isascii() and (c.isalnum() or c in '._-') for c in n) for n in names), names

# --- runs that end early

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.lock' and p.name != 'provenance.json'}

@pytest.fixture(scope='module')
def whole(tmp_path_factory, predictor, films):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp('whole')
    told = A.predict_files(predictor, films, out, batch_size=4)
    assert told['complete'] and told['counts'] == dict(files=13, read=11, unreadable=2, warned=0, NORMAL=told['counts']['NORMAL'], PNEUMONIA=11 - told['counts']['NORMAL'])
    return out

def test_files_of_a_run(whole, predictor, films):
    table = A.read_table(whole/'predictions.csv')
    direct = predictor.predict(films, batch_size=4)
    assert table.path.tolist() == direct.path.tolist() and table.label.tolist() == direct.label.tolist() and table.error.tolist() == direct.error.tolist()
    np.testing.assert_allclose(table.probability, direct.probability, rtol=1e-6)
    assert set(contents(whole)) == {'predictions.csv', *table.heatmap[table.heatmap != '']} and (table.heatmap != '').sum() == 11
    drawn = table[table.heatmap != ''].iloc[0]
    assert np.abs(np.asarray(Image.open(whole/drawn.heatmap)).astype(int) - predictor.explain(drawn.path, view=256).overlay).max() <= 2
    told = read_json(whole/'provenance.json')
    assert told['caveat'] == P.CAVEAT and told['model']['sha256'] == predictor.digest and told['versions']['torch'] and told['settings']['threshold'] == .45
    assert str(films) not in json.dumps(told)

def test_resume_from_every_kind_of_tear(tmp_path, whole, predictor, films):
    out, expected = tmp_path/'out', contents(whole)
    size = len(expected['predictions.csv'])
    for cut in [0, 1, 90, *range(130, size, size // 5), size - 1, size]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        os.truncate(out/'predictions.csv', cut)
        write_json(out/'provenance.json', read_json(whole/'provenance.json') | dict(complete=False))
        (out/'heatmaps'/'.half.1.tmp').write_bytes(b'x')
        assert len(A.read_table(out/'predictions.csv')) <= 13
        told = A.predict_files(predictor, films, out, batch_size=4, resume=True)
        assert contents(out) == expected, cut
        assert told['complete'] and told['counts'] == read_json(whole/'provenance.json')['counts'] and told['created'] == read_json(whole/'provenance.json')['created']

def test_ctrl_c_leaves_whole_rows_that_resume_completes(tmp_path, whole, predictor, films, monkeypatch):
    answers, fifth = predictor._answers, A.read_table(whole/'predictions.csv').path[4]
    def interrupted(reads, *a):
        if reads[0].path == fifth: raise KeyboardInterrupt
        return answers(reads, *a)
    monkeypatch.setattr(predictor, '_answers', interrupted)
    with pytest.raises(KeyboardInterrupt, match='stopped after 4 files'): A.predict_files(predictor, films, tmp_path, batch_size=4)
    monkeypatch.undo()
    table, told = A.read_table(tmp_path/'predictions.csv'), read_json(tmp_path/'provenance.json')
    assert len(table) == 4 == told['counts']['files'] and not told['complete'] and (tmp_path/'predictions.csv').read_bytes().endswith(b'\n')
    assert contents(whole)['predictions.csv'].startswith((tmp_path/'predictions.csv').read_bytes())
    A.predict_files(predictor, films, tmp_path, batch_size=4, resume=True)
    assert contents(tmp_path) == contents(whole)

def test_a_full_disk_leaves_whole_rows(tmp_path):
    table = A._Table(tmp_path/'t.csv', [])
    table.append([['a'] + [''] * 8])
    before, file = (tmp_path/'t.csv').read_bytes(), table.file
    class Full:
        def __getattr__(self, name): return getattr(file, name)
        def write(self, content):
            if len(content) < 10: raise OSError(28, 'No space left on device')
            return file.write(content[:10])
    table.file = Full()
    with pytest.raises(OSError, match='No space'): table.append([['b' * 40] + [''] * 8])
    file.close()
    assert (tmp_path/'t.csv').read_bytes() == before

def test_finished_runs_and_new_files(tmp_path, predictor, films):
    folder, out = tmp_path/'in', tmp_path/'out'
    shutil.copytree(films/'a', folder)
    A.predict_files(predictor, folder, out, batch_size=4)
    before = (out/'predictions.csv').read_bytes()
    assert A.predict_files(predictor, folder, out, batch_size=4, resume=True)['counts']['files'] == 7 and (out/'predictions.csv').read_bytes() == before
    shutil.copy(films/'b'/'film 0.jpeg', folder/'0 new.jpeg')
    A.predict_files(predictor, folder, out, resume=True)
    assert (out/'predictions.csv').read_bytes().startswith(before) and A.read_table(out/'predictions.csv').path.tolist()[7:] == [str(folder/'0 new.jpeg')]

def test_named_twice_is_two_rows_also_after_resume(tmp_path, predictor, films):
    twice = [films/'a'/'film 0.jpeg'] * 5
    A.predict_files(predictor, twice, tmp_path, batch_size=2)
    rows = A._whole_rows(tmp_path/'predictions.csv')
    (tmp_path/'predictions.csv').write_bytes(b''.join(rows[:4]))
    write_json(tmp_path/'provenance.json', read_json(tmp_path/'provenance.json') | dict(complete=False))
    assert A.predict_files(predictor, twice, tmp_path, batch_size=2, resume=True)['counts']['files'] == 5 == len(A.read_table(tmp_path/'predictions.csv'))

def test_what_must_not_be_continued(tmp_path, model, predictor, films, whole):
    out = tmp_path/'out'
    shutil.copytree(whole, out)
    before, other = contents(out), network()
    other.head.bias.data += 1
    with pytest.raises(ValueError, match='holds results already'): A.predict_files(predictor, films, out)
    for match, p, options in [('threshold', P.Predictor.load(model, threshold=.9), {}), ('heatmaps', predictor, dict(heatmaps=False)), ('model', P.Predictor.load(saved(tmp_path/'m.safetensors', other)), {})]:
        with pytest.raises(ValueError, match=f'other settings: {match}'): A.predict_files(p, films, out, resume=True, **options)
    with FileLock(out/'.predict.lock'), pytest.raises(RuntimeError, match='another process'): A.predict_files(predictor, films, out, resume=True)
    (out/'predictions.csv').write_text('path,score\nx,1\n')
    with pytest.raises(ValueError, match='no table of this program'): A.predict_files(predictor, films, out, resume=True)
    (out/'provenance.json').unlink()
    with pytest.raises(ValueError, match='no provenance.json'): A.predict_files(predictor, films, out, resume=True)
    assert (out/'predictions.csv').read_text() == 'path,score\nx,1\n' and all((out/n).read_bytes() == c for n, c in before.items() if n != 'predictions.csv')
    (tmp_path/'nothing').mkdir()
    with pytest.raises(FileNotFoundError, match='no image'): A.predict_files(predictor, tmp_path/'nothing', tmp_path/'never')
    assert not (tmp_path/'never').exists()

@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_killed_at_any_moment(tmp_path, model, phantom_images, predictor):
    "A real process, killed three times without notice, ends with the same bytes."
    folder = phantom_images/'test'
    A.predict_files(predictor, folder, tmp_path/'whole', batch_size=4)
    code = (f'import time; from cxr_lab.answers import *; from cxr_lab.predict import *; p = Predictor.load({str(model)!r}, device="cpu"); a = p._answers\n'
            'def slow(*x): time.sleep(.5); return a(*x)\n'
            f'p._answers = slow; print("go", flush=True); predict_files(p, {str(folder)!r}, {str(tmp_path/"out")!r}, batch_size=4, resume=True)')
    for seconds in (.7, .9, .8):
        with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
    assert not read_json(tmp_path/'out'/'provenance.json')['complete'], 'it was killed too late to prove anything'
    subprocess.run([sys.executable, '-c', code], check=True)
    assert contents(tmp_path/'out') == contents(tmp_path/'whole')
