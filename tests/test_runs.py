"The run folder: atomic writes, typed metrics, checked predictions, concurrent updates."
import errno, json, multiprocessing as mp, os, threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_lab import runs
from cxr_lab.runs import (MissingUpstream, Step, atomic_path, expect_error, holds, outdated, read_json, read_metrics, read_predictions, resolve_run_dir,
                          update_json, write_json, write_metrics, write_predictions)


def table(**columns):
    base = dict(path=['test/b.jpeg', 'test/a.jpeg'], patient=['1', '2'], split=['test', 'train'], label=[1, 0], probability=[.75, .25])
    return pd.DataFrame(base | columns)


# Atomic writes

@pytest.mark.parametrize('error', [ValueError('x'), KeyboardInterrupt(), SystemExit(1)])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path/'a.json'
    write_json(path, {'v': 1})
    with pytest.raises(type(error)):
        with atomic_path(path) as temporary:
            temporary.write_text('half')
            raise error
    assert read_json(path) == {'v': 1} and os.listdir(tmp_path) == ['a.json']

@pytest.mark.parametrize('where', ['write', 'fsync', 'replace'])
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file_and_cleans_up(tmp_path, monkeypatch, where, code):
    path = tmp_path/'predictions.csv'
    write_predictions(path, table())
    before = path.read_bytes()
    def full(*a, **k): raise OSError(code, 'No space left on device')
    if where == 'write': monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda self, p, **k: (Path(p).write_text('path,pat'), full()))
    else: monkeypatch.setattr(runs.os, where, full)
    with pytest.raises(OSError, match='disk is full.*predictions.csv') as e: write_predictions(path, table(probability=[.5, .5]))
    assert e.value.errno == code
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['predictions.csv']

def test_other_os_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError, match='denied'):
        with atomic_path(tmp_path/'x'): raise PermissionError(errno.EACCES, 'denied')

def test_temporary_name_is_hidden_beside_with_the_same_suffix(tmp_path):
    with atomic_path(tmp_path/'new'/'a.b.png') as temporary:
        assert temporary.parent == tmp_path/'new' and temporary.suffix == '.png' and temporary.name.startswith('.')
        temporary.touch()
    assert os.listdir(tmp_path/'new') == ['a.b.png']

def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing was written'):
        with atomic_path(tmp_path/'x'): pass

def test_folders_are_atomic_too(tmp_path):
    with pytest.raises(ValueError):
        with atomic_path(tmp_path/'d') as temporary:
            temporary.mkdir(); (temporary/'f').touch()
            raise ValueError
    assert not os.listdir(tmp_path)
    with atomic_path(tmp_path/'d') as temporary: temporary.mkdir(); (temporary/'f').touch()
    assert (tmp_path/'d'/'f').exists() and os.listdir(tmp_path) == ['d']

def test_reader_never_sees_half_a_file(tmp_path):
    path, stop, seen = tmp_path/'a.json', threading.Event(), []
    write_json(path, ['0'*50_000])
    def read():
        while not stop.is_set(): seen.append(len(set(read_json(path)[0])))
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40): write_json(path, [str(i % 10)*50_000])
    stop.set(); reader.join()
    assert seen and set(seen) == {1}


# JSON and metrics

@pytest.mark.parametrize('content', [b'{"a": 1', b'', b'\xff\xfe{}'])
def test_corrupted_json_names_the_file(tmp_path, content):
    (tmp_path/'run.json').write_bytes(content)
    with pytest.raises(ValueError, match='run.json is not valid JSON'): read_json(tmp_path/'run.json')

def test_corrupted_run_json_stops_a_step_and_is_not_overwritten(tmp_path):
    (tmp_path/'run.json').write_text('{"parameters": ')
    with pytest.raises(ValueError, match='run.json is not valid JSON'): Step(tmp_path, '00_data', {})
    assert (tmp_path/'run.json').read_text() == '{"parameters": '

def test_metric_types_survive(tmp_path):
    given = dict(b=True, i=3, f=.1, s='ü', none=None, npb=np.bool_(False), npi=np.int32(4), npf=np.float64(.25), nps=np.str_('x'), a=np.array(2))
    write_metrics(tmp_path/'m.json', given)
    read = read_metrics(tmp_path/'m.json')
    assert read == dict(b=True, i=3, f=.1, s='ü', none=None, npb=False, npi=4, npf=.25, nps='x', a=2)
    assert [type(read[k]) for k in ('b', 'i', 'f', 'npb', 'npi', 'npf')] == [bool, int, float, bool, int, float]

@pytest.mark.parametrize('value,error', [(float('nan'), ValueError), (float('inf'), ValueError), (np.float32('-inf'), ValueError), ([1], TypeError),
                                         ({'x': 1}, TypeError), (np.zeros(2), TypeError), (Path('x'), TypeError)])
def test_metrics_that_are_not_flat_or_finite_name_the_key(tmp_path, value, error):
    with pytest.raises(error, match="'auroc'"): write_metrics(tmp_path/'m.json', {'n': 1, 'auroc': value})
    assert not os.listdir(tmp_path)

def test_metrics_are_a_dict_with_string_keys(tmp_path):
    with pytest.raises(TypeError, match='one dict'): write_metrics(tmp_path/'m.json', [1])
    with pytest.raises(TypeError, match='are strings'): write_metrics(tmp_path/'m.json', {1: 1})
    write_json(tmp_path/'m.json', {'a': {'b': 1}})
    with pytest.raises(TypeError, match="m.json: 'a'"): read_metrics(tmp_path/'m.json')


# Predictions

@pytest.mark.parametrize('df,match', [
    (table().drop(columns='split'), r"missing: \['split'\]"),
    (table(logit=[0., 1.]), r"not allowed: \['logit'\]"),
    (table(probability=[np.nan, .5]), 'no probability in 1 of 2'),
    (table(patient=[None, '1']), 'no patient'),
    (table(path=['', 'a']), 'no path'),
    (table(label=[1, 2]), 'neither 0'),
    (table(label=['NORMAL', 'PNEUMONIA']), 'neither 0'),
    (table(label=[.5, 1]), 'neither 0'),
    (table(probability=[1.0001, 0]), 'outside 0 to 1'),
    (table(probability=[-1e-9, 0]), 'outside 0 to 1'),
    (table(probability=['high', 0]), 'outside 0 to 1'),
    (table(path=['a', 'a']), 'occurs twice'),
    (table(split=['test', 'val']), 'a split that is none of'),
])
def test_predictions_schema(tmp_path, df, match):
    with pytest.raises(ValueError, match=match): write_predictions(tmp_path/'p.csv', df)
    assert not os.listdir(tmp_path)
    df.to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(ValueError, match=match): read_predictions(tmp_path/'p.csv')

def test_predictions_round_trip_and_equal_bytes(tmp_path):
    df = table(path=['test/Ä, "b".jpeg', 'test/a.jpeg'], patient=['NA', '007'], probability=np.float32([1/3, 1e-12]))
    written = write_predictions(tmp_path/'1.csv', df)
    write_predictions(tmp_path/'2.csv', df.iloc[::-1])
    write_predictions(tmp_path/'3.csv', written)
    assert (tmp_path/'1.csv').read_bytes() == (tmp_path/'2.csv').read_bytes() == (tmp_path/'3.csv').read_bytes()
    assert b'\r' not in (tmp_path/'1.csv').read_bytes()
    assert written.path.tolist() == ['test/a.jpeg', 'test/Ä, "b".jpeg'] and written.patient.tolist() == ['007', 'NA']
    assert written.label.dtype.kind == 'i' and written.probability.dtype == float and written.probability.tolist() == [1e-12, .33333334]
    pd.testing.assert_frame_equal(written, read_predictions(tmp_path/'1.csv'))

def test_broken_prediction_files_name_the_file(tmp_path):
    for content in ['', 'path,patient\n"a', 'a,b\n1,2,3\n4\n1,2,3,4,5\n']:
        (tmp_path/'p.csv').write_text(content)
        with pytest.raises(ValueError, match='p.csv'): read_predictions(tmp_path/'p.csv')


# Steps

def test_step_reads_what_another_left(tmp_path):
    a = Step(tmp_path/'r', '00_data', {'seed': 1})
    a.record(dataset={'kind': 'phantom', 'n': np.int64(3)})
    a.write_metrics({'x': 1}, 'seed_0'); a.write_predictions(table()); a.write_csv(pd.DataFrame({'a': [1/3]}), 'log.csv')
    b = Step(tmp_path/'r', '01_explore', {})
    assert b.params('00_data') == {'seed': 1} and b.fact('dataset') == {'kind': 'phantom', 'n': 3}
    assert b.metrics('00_data', 'seed_0') == {'x': 1} and len(b.predictions('00_data')) == 2
    assert b.need('00_data', 'log.csv').read_text() == 'a\n0.33333333\n'
    assert b.path('deep/x.txt').parent.is_dir()
    content = read_json(tmp_path/'r'/'run.json')
    assert set(content['versions']) == {'python', 'cxr_lab', 'torch', 'torchvision', 'pytorch-lightning', 'scikit-learn', 'numpy'}
    assert content['created'] <= content['updated']

def test_missing_upstream_names_the_notebook_and_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = Step('runs/x', '03_train', {})
    for ask in [lambda: step.need('00_data', 'index.csv'), lambda: step.metrics('00_data'), lambda: step.predictions('00_data', 'seed_0'), lambda: step.params('00_data')]:
        with pytest.raises(MissingUpstream, match="of 00_data (is|are) missing from run 'runs/x': run notebook 00_data first, e.g. `cxr-lab run 00_data --run-dir runs/x`"): ask()
    with pytest.raises(MissingUpstream, match='recorded: none yet'): step.fact('dataset')

def test_step_in_a_place_that_is_a_file(tmp_path):
    (tmp_path/'f').touch()
    with pytest.raises(NotADirectoryError, match='is a file'): Step(tmp_path/'f', '00_data', {})
    with pytest.raises(ValueError, match='not the name of a notebook'): Step(tmp_path, '../00_data', {})

def test_figures(tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    step = Step(tmp_path, '01_explore', {})
    step.save_figure(fig, 'a'); step.save_figure(fig, 'b', dpi=50); plt.close(fig)
    assert (step.dir/'a.png').read_bytes()[:4] == b'\x89PNG' and (step.dir/'b.png').stat().st_size < (step.dir/'a.png').stat().st_size

def test_a_new_step_is_no_longer_complete(tmp_path):
    write_json(tmp_path/'00_data'/'status.json', {'id': 'a', 'upstream': {}})
    write_json(tmp_path/'01_explore'/'status.json', {'id': 'b', 'upstream': {'00_data': 'a'}})
    assert outdated(tmp_path, '01_explore') == []
    Step(tmp_path, '00_data', {})
    assert not (tmp_path/'00_data'/'status.json').exists() and outdated(tmp_path, '01_explore') == ['00_data']

def test_run_dir_from_nbs_means_the_checkout(tmp_path, monkeypatch):
    (tmp_path/'nbs').mkdir()
    monkeypatch.chdir(tmp_path/'nbs')
    assert resolve_run_dir('runs/x') == Path('runs/x')
    (tmp_path/'settings.ini').touch()
    assert resolve_run_dir('runs/x').resolve() == tmp_path/'runs/x'
    assert resolve_run_dir(tmp_path/'y') == tmp_path/'y'

def _add(run, name):
    step = Step(run, name, {})
    for i in range(50): step.record(**{f'{name}-{i}': i})

def test_two_processes_lose_no_update(tmp_path):
    context = mp.get_context('spawn')
    workers = [context.Process(target=_add, args=(tmp_path, name)) for name in ('00_a', '01_b')]
    for w in workers: w.start()
    for w in workers: w.join()
    content = read_json(tmp_path/'run.json')
    assert sum('-' in k for k in content) == 100 and set(content['parameters']) == {'00_a', '01_b'}

def test_update_json_refuses_what_is_no_dict(tmp_path):
    (tmp_path/'a.json').write_text('[]')
    with pytest.raises(ValueError, match='does not hold a dict'): update_json(tmp_path/'a.json', lambda d: None)

def test_facts_cannot_replace_what_step_writes(tmp_path):
    with pytest.raises(ValueError, match='by Step itself'): Step(tmp_path, '00_data', {}).record(parameters={})


def test_expect_error(capsys):
    with expect_error(ValueError, 'ab+'): raise ValueError('xabbx')
    assert capsys.readouterr().out == 'ValueError: xabbx\n'
    with pytest.raises(AssertionError, match='nothing was raised'):
        with expect_error(ValueError): pass
    with pytest.raises(AssertionError, match='does not match'):
        with expect_error(ValueError, 'y'): raise ValueError('x')
    with pytest.raises(AssertionError, match='got TypeError'):
        with expect_error(ValueError): raise TypeError('x')

def test_sentences_that_do_not_hold_are_named(capsys, monkeypatch):
    monkeypatch.delenv('CXR_LAB_STRICT', raising=False)
    holds({'a is one': True, 'b is two': np.bool_(True)})
    assert capsys.readouterr().out == 'sentences checked: 2, all of them hold\n'
    said = {'a is one': True, 'b is two': np.bool_(False), 'c is three': False}
    holds(said)
    assert capsys.readouterr().out == 'does not hold here: b is two\ndoes not hold here: c is three\n'
    monkeypatch.setenv('CXR_LAB_STRICT', '1')
    with pytest.raises(AssertionError, match='b is two\ndoes not hold here: c is three$'): holds(said)
    holds({'a is one': True})

def test_progress_is_silent_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    for value, shown in [('0', False), ('1', True), (None, False)]:
        monkeypatch.delenv('CXR_LAB_PROGRESS', raising=False) if value is None else monkeypatch.setenv('CXR_LAB_PROGRESS', value)
        assert list(runs.progress([1, 2], 'counting')) == [1, 2]
        out = capsys.readouterr()
        assert ('counting' in out.out) == shown and not out.err
    monkeypatch.setenv('JPY_SESSION_NAME', 'lesson.ipynb')
    assert not runs.progress(None, 'by hand', total=2).disable
