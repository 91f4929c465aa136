"What is kept in a cache: found by its facts, verified, made once, gone where it failed."
import subprocess, sys, textwrap, time

import pytest

from cxr_lab import stored as module
from cxr_lab.kept import only_since
from cxr_lab.stored import Stored, cache_dir, stored

class Maker:
    "Writes one file, and counts how often it is asked to."
    def __init__(self, text='content', told=None): self.text, self.told, self.n = text, told, 0
    def __call__(self, folder):
        self.n += 1
        (folder/'sub').mkdir()
        (folder/'sub'/'file').write_text(self.text)
        return self.told

@pytest.fixture
def make(): return Maker(told={'seconds': 1.5})

def ask(place, make, facts=dict(n=3), **options):
    return stored(place, facts, make, 'the thing', **options)

def folders(place): return sorted(p for p in place.iterdir() if p.is_dir())

def test_the_second_time_it_is_there(tmp_path, make):
    first, second = ask(tmp_path/'new', make), ask(tmp_path/'new', make)
    assert make.n == 1 and first.folder == second.folder and first.told == second.told == {'seconds': 1.5}
    assert first.kept == '' and second.kept.startswith('kept from ')
    assert (second.folder/'sub'/'file').read_text() == 'content'
    assert repr(first) == f'Stored({first.folder.name}: made now)' and 'kept from' in repr(second)
    assert isinstance(first, Stored)

def test_other_facts_are_another_place(tmp_path, make):
    places = [dict(n=3), dict(n=4), dict(n='3'), dict(n=3, m=None), dict(m=3)]
    assert len({ask(tmp_path, make, facts).folder for facts in places}) == make.n == 5
    ask(tmp_path, make, dict(m=None, n=3))
    assert make.n == 5, 'the order of facts does not matter'
    ask(tmp_path, make, dict(shape=(1, 2)))
    assert ask(tmp_path, make, dict(shape=[1, 2])).kept and make.n == 6, 'a tuple is a list in JSON'
    with pytest.raises(TypeError): ask(tmp_path, make, dict(n=object()))

@pytest.mark.parametrize('damage', ['a bit', 'shorter', 'longer', 'gone', 'meta cut', 'meta gone',
                                    'meta a list', 'other facts', 'a file'])
def test_what_is_damaged_is_made_again(tmp_path, make, capsys, damage):
    folder = ask(tmp_path, make).folder
    file, meta = folder/'sub'/'file', folder/'meta.json'
    if damage == 'a bit': file.write_text('contenu')
    if damage == 'shorter': file.write_text('conten')
    if damage == 'longer': file.write_text('contents')
    if damage == 'gone': file.unlink()
    if damage == 'meta cut': meta.write_text(meta.read_text()[:40])
    if damage == 'meta gone': meta.unlink()
    if damage == 'meta a list': meta.write_text('[]')
    if damage == 'other facts': meta.write_text(meta.read_text().replace('"n": 3', '"n": 4'))
    if damage == 'a file': meta.write_text(meta.read_text().replace('"sub/file"', '"sub"'))
    again = ask(tmp_path, make)
    assert make.n == 2 and again.folder == folder and file.read_text() == 'content'
    assert capsys.readouterr().out == 'the thing is damaged and is made again\n'
    assert ask(tmp_path, make).kept and folders(tmp_path) == [folder]

def test_each_block_has_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_BLOCK', 10)
    make = Maker('0123456789' * 3 + 'rest')
    file = ask(tmp_path, make).folder/'sub'/'file'
    for n, at in enumerate((0, 9, 10, 25, 33), 2):
        content = bytearray(file.read_bytes()); content[at] ^= 1; file.write_bytes(content)
        ask(tmp_path, make)
        assert make.n == n, at

def test_of_much_only_a_part_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_BLOCK', 10)
    make = Maker('0123456789' * 200)
    folder = ask(tmp_path, make).folder
    about = module.read_json(folder/'meta.json')['files']
    looked, look = [], module._block_is
    monkeypatch.setattr(module, '_block_is', lambda *block: looked.append(block[1]) or look(*block))
    assert module._is_sound(folder, about) and len(looked) == 200
    looked.clear()
    assert module._is_sound(folder, about, full=1999)
    assert len(looked) == 64 and looked[0] == 0 and looked[-1] == 199
    (folder/'sub'/'file').write_bytes(b'x' * 1990)
    assert not module._is_sound(folder, about, full=1999), 'the sizes are compared in any case'

def test_fresh(tmp_path, make, capsys):
    file = ask(tmp_path, make).folder/'meta.json'
    assert not ask(tmp_path, make, fresh=True).kept and make.n == 2
    with only_since(file.stat().st_mtime + 1): ask(tmp_path, make)
    assert make.n == 3 and capsys.readouterr().out == ''

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, error):
    def fails(folder):
        (folder/'half').touch()
        raise error
    with pytest.raises(error): ask(tmp_path, fails)
    assert folders(tmp_path) == []

def test_what_fails_replaces_nothing_sound(tmp_path, make):
    def fails(folder): raise ValueError
    folder = ask(tmp_path, make).folder
    with pytest.raises(ValueError): ask(tmp_path, fails, dict(n=4))
    assert ask(tmp_path, make).kept and folders(tmp_path) == [folder]

class Steps:
    "Three steps, interrupted after each of the first two."
    def __init__(self): self.begun_with = []
    def __call__(self, folder):
        done = len(list(folder.iterdir()))
        self.begun_with.append(done)
        for i in range(done, 3):
            (folder/f'{i}').touch()
            if i == done and i < 2: raise KeyboardInterrupt
        return {'began with': done}

def test_what_was_interrupted_goes_on(tmp_path):
    steps = Steps()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): ask(tmp_path, steps, resumable=True)
    done = ask(tmp_path, steps, resumable=True)
    assert steps.begun_with == [0, 1, 2] and done.told == {'began with': 2}
    assert folders(tmp_path) == [done.folder] and not list(tmp_path.glob('*.begun'))
    assert ask(tmp_path, steps, resumable=True).kept

@pytest.mark.parametrize('how', ['fresh', 'since', 'unmarked'])
def test_a_fresh_start_does_not_go_on(tmp_path, how):
    steps = Steps()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): ask(tmp_path, steps, resumable=True)
    begun, = tmp_path.glob('*.begun')
    if how == 'unmarked': begun.unlink()
    moment = begun.stat().st_mtime + 1 if how == 'since' else 0
    with only_since(moment), pytest.raises(KeyboardInterrupt):
        ask(tmp_path, steps, resumable=True, fresh=how == 'fresh')
    assert steps.begun_with == [0, 1, 0]

def test_two_processes_make_it_once(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from cxr_lab.stored import stored
        place = Path(sys.argv[1])
        def slow(folder): print('made'); time.sleep(1); (folder/'x').touch()
        (place/f'ready{time.time_ns()}').touch()
        while not (place/'go').exists(): time.sleep(.01)
        print(stored(place/'all', {}, slow, 'the thing').folder.name)
    """
    command = [sys.executable, '-c', textwrap.dedent(code), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while len(list(tmp_path.glob('ready*'))) < 2 and all(p.poll() is None for p in both): time.sleep(.05)
    (tmp_path/'go').touch()
    lines = sorted(p.communicate(timeout=300)[0].split() for p in both)
    assert sorted(map(len, lines)) == [1, 2] and lines[0][-1] == lines[1][-1], lines

def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv('CXR_LAB_CACHE')
    assert cache_dir().name == 'cxr_lab' and cache_dir().is_absolute()
