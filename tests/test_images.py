"Files, layouts and networks that go wrong: what is read, what is refused, with which message, and what is left behind."
import errno, hashlib, http.server, io, logging, os, shutil, subprocess, sys, textwrap, threading, time, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
import pytest
from PIL import Image

from cxr_lab import films, images, stored
from cxr_lab.data import check_no_leakage, index_images
from cxr_lab.films import MAX_BYTES, read_pixels
from cxr_lab.images import INDEX_COLUMNS, fetch, find_data, fingerprint, pixel_cache, unpack_images
from cxr_lab.kept import only_since
from cxr_lab.runs import CLASSES, FOLDERS
from layouts import NAMES, encoded, first, gray, layout

@pytest.fixture
def root(tmp_path): return layout(tmp_path/'images')


# Layouts that are wrong

def test_a_sound_layout(root):
    index, rejected = index_images(root)
    assert list(index) == list(INDEX_COLUMNS) and len(index) == 12 and not len(rejected) and list(index.path) == sorted(index.path)
    row = index.set_index('path').loc['train/PNEUMONIA/person0_virus_1.jpeg']
    content = (root/row.name).read_bytes()
    assert (row.split, row.label, row.patient, row.subtype, row.width, row.height, row['mode'], row.bytes) == ('train', 1, 'person0_virus', 'virus', 40, 30, 'L', len(content))
    assert row.sha256 == hashlib.sha256(content).hexdigest()

def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"): index_images(tmp_path/'nowhere')
    (tmp_path/'file').touch()
    with pytest.raises(FileNotFoundError, match="no folder 'file'"): index_images(tmp_path/'file')

@pytest.mark.parametrize('split', ['train', 'test'])
def test_missing_split(root, split):
    shutil.rmtree(root/split)
    with pytest.raises(FileNotFoundError, match=f'images/{split}/ is missing; the layout is'): index_images(root)

def test_val_may_be_absent_or_there(root, tmp_path):
    assert set(index_images(root)[0].split) == {'train', 'test'}
    assert set(index_images(layout(tmp_path/'three', splits=('train', 'val', 'test')))[0].split) == {'train', 'val', 'test'}

@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('c', CLASSES)
@pytest.mark.parametrize('how', ['no folder', 'no files', 'no readable file'])
def test_empty_class(root, split, c, how):
    if how == 'no readable file':
        for p in (root/split/c).iterdir(): p.write_bytes(b'')
    else:
        shutil.rmtree(root/split/c)
        if how == 'no files': (root/split/c).mkdir()
    with pytest.raises(ValueError, match=f'images/{split}/{c}/ holds no readable image'): index_images(root)

@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_split_without_any_image(root, split):
    for c in CLASSES:
        for p in (root/split/c).iterdir(): p.unlink()
    with pytest.raises(ValueError, match=f'images/{split}/NORMAL/ holds no readable image'): index_images(root)

def test_a_data_set_without_any_image(root):
    for p in root.rglob('*.jpeg'): p.unlink()
    with pytest.raises(ValueError, match='holds no readable image'): index_images(root)

def test_unknown_class_folder(root):
    (root/'test'/'TUBERCULOSIS').mkdir()
    with pytest.raises(ValueError, match=r'images/test/ has unknown class folders TUBERCULOSIS; the classes are NORMAL, PNEUMONIA'): index_images(root)

def test_hidden_folders_of_tools_are_no_classes(root):
    "JupyterLab leaves .ipynb_checkpoints in every folder it shows."
    image = first(root)
    for folder in ('train/.ipynb_checkpoints', 'train/NORMAL/.ipynb_checkpoints'):
        (root/folder).mkdir()
        shutil.copy(image, root/folder/'IM-0000-0001-checkpoint.jpeg')
    assert len(index_images(root)[0]) == 12

def half(content): return content[:len(content) // 2]

BAD = {'text': (b'<html>404</html>', 'not an image'), 'zero bytes': (b'', 'the file is empty'), 'half a JPEG': (half(encoded(gray(400, 300))), 'damaged image'),
       'JPEG without its end': (encoded(gray(400, 300))[:-100], 'damaged image'), 'half a PNG': (half(encoded(gray(400, 300), 'PNG')), 'damaged image'),
       'half a progressive JPEG': (half(encoded(gray(400, 300), progressive=True)), 'damaged image'),
       'a bomb': (encoded(Image.new('1', (20_000, 20_000)), 'PNG'), 'pixels|bomb'), 'floats': (encoded(gray().astype(np.float32), 'TIFF'), 'floating-point')}

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BAD)
def test_unreadable_files_are_listed_with_the_reason_and_counted(root, name):
    content, reason = BAD[name]
    path = first(root)
    path.write_bytes(content)
    index, rejected = index_images(root)
    assert len(index) == 11 and list(rejected.path) == [path.relative_to(root).as_posix()]
    assert pd.Series(rejected.reason).str.contains(reason).all()
    with pytest.raises(ValueError, match=reason): read_pixels(content, 32)

def test_files_in_the_wrong_place_are_listed(root):
    for place in ('train/IM-0900-0001.jpeg', 'train/NORMAL/sub/IM-0901-0001.jpeg'):
        (root/place).parent.mkdir(exist_ok=True)
        shutil.copy(first(root), root/place)
    index, rejected = index_images(root)
    assert len(index) == 12 and set(rejected.reason) == {'not directly in a class folder'} and len(rejected) == 2

@pytest.mark.skipif(os.name == 'nt' or getattr(os, 'geteuid', int)() == 0, reason='needs a file that may not be read')
def test_a_file_that_may_not_be_read_is_listed(root):
    first(root).chmod(0)
    assert 'denied' in index_images(root)[1].reason[0]


# Files that are none

@pytest.mark.skipif(sys.platform == 'win32', reason='a shell script')
@pytest.mark.parametrize('name', ['IM-0001-0001.eps', 'IM-0001-0001.jpeg'])
def test_content_of_a_file_starts_no_program(root, tmp_path, monkeypatch, name):
    "Pillow would hand PostScript to Ghostscript, whatever the file is called."
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n'); (tmp_path/'bin'/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    page = encoded(Image.fromarray(np.dstack([gray()] * 3)), 'EPS')
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    with pytest.raises(OSError): Image.open(io.BytesIO(page)).load()
    assert (tmp_path/'started').exists(), 'it does not even with Pillow alone: this proves nothing'
    (tmp_path/'started').unlink()
    (root/'train'/'NORMAL'/name).write_bytes(page)
    rejected = index_images(root)[1]
    assert rejected.path.tolist() == [f'train/NORMAL/{name}'] and rejected.reason.tolist() == ['not an image'] and not (tmp_path/'started').exists()

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_pipes_devices_and_links_cost_one_row_each(root):
    "None of them is waited for, and none is left out without a word."
    folder = root/'train'/'NORMAL'
    os.mkfifo(folder/'IM-0900-0001.jpeg')
    os.symlink('IM-0900-0001.jpeg', folder/'IM-0901-0001.jpeg')
    os.symlink('/dev/zero', folder/'IM-0902-0001.jpeg')
    os.symlink('nowhere', folder/'IM-0903-0001.jpeg')
    os.symlink('../PNEUMONIA', folder/'IM-0904-0001.jpeg')
    os.symlink('IM-0905-0001.jpeg', folder/'IM-0905-0001.jpeg')
    os.symlink(first(root, 'test').resolve(), folder/'IM-0906-0001.jpeg')
    with open(folder/'IM-0907-0001.jpeg', 'wb') as f: f.truncate(MAX_BYTES + 1)
    reasons = index_images(root)[1].set_index('path').reason
    ordinary = 'not an ordinary file (a pipe, a socket or a device)'
    assert reasons.to_dict() == {f'train/NORMAL/IM-090{i}-0001.jpeg': why for i, why in {
        0: ordinary, 1: ordinary, 2: ordinary, 3: 'there is no such file', 4: 'a folder, not a file', 5: f'cannot be read ({os.strerror(errno.ELOOP)})',
        7: f'the file has {MAX_BYTES + 1:,} bytes, more than {MAX_BYTES:,}'}.items()}
    assert 'train/NORMAL/IM-0906-0001.jpeg' in index_images(root)[0].path.tolist(), 'a link to an image is an image'

def test_a_file_that_became_a_pipe(root, tmp_path):
    index = index_images(root)[0]
    (root/index.path[0]).unlink(); os.mkfifo(root/index.path[0])
    with pytest.raises(RuntimeError, match=r'cannot be read any more \(not an ordinary file.*run 00_data again'): pixel_cache(root, index, 32, folder=tmp_path/'caches')


# Pixel cache

def cached(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock')) if folder.exists() else []

@pytest.fixture
def cache(root, tmp_path):
    "An index, its cache, and where it is."
    index, folder = index_images(root)[0], tmp_path/'caches'
    return root, index, folder, np.array(pixel_cache(root, index, 32, folder=folder))

def built(monkeypatch):
    "Counts how often a cache is built."
    calls, build = [], images._build_cache
    monkeypatch.setattr(images, '_build_cache', lambda *a: (calls.append(1), build(*a))[1])
    return calls

def test_cache_holds_the_index_in_its_order(cache, monkeypatch):
    root, index, folder, pixels = cache
    calls = built(monkeypatch)
    again = pixel_cache(root, index, 32, folder=folder)
    assert not calls and isinstance(again, np.memmap) and not again.flags.writeable and again.shape == (12, 1, 32, 32)
    for i, path in enumerate(index.path): assert (again[i] == read_pixels((root/path).read_bytes(), 32)).all()
    assert len(cached(folder)) == 1

def test_cache_of_more_than_one_chunk(cache, monkeypatch):
    root, index, folder, pixels = cache
    monkeypatch.setattr(images, '_chunk', lambda size: 5)
    monkeypatch.setattr(stored, '_BLOCK', 5 * 32 * 32)
    shutil.rmtree(folder)
    assert (pixel_cache(root, index, 32, folder=folder) == pixels).all()
    one = next(folder.glob('*/pixels.npy'))
    for at in (-1, 200, -3000):
        bad = bytearray(one.read_bytes()); bad[at] ^= 255; one.write_bytes(bad)
        calls = built(monkeypatch)
        assert (pixel_cache(root, index, 32, folder=folder) == pixels).all() and calls

def test_another_order_size_or_aspect_is_another_cache(cache, monkeypatch):
    root, index, folder, pixels = cache
    calls, turned = built(monkeypatch), index[::-1].reset_index(drop=True)
    assert (pixel_cache(root, turned, 32, folder=folder) == pixels[::-1]).all() and len(calls) == 1
    assert pixel_cache(root, index, 48, folder=folder).shape[-1] == 48 and len(calls) == 2
    assert (pixel_cache(root, index, 32, 'pad', folder=folder) != pixels).any() and len(calls) == 3
    assert len(pixel_cache(root, index[:5], 32, folder=folder)) == 5 and len(calls) == 4 and len(cached(folder)) == 5
    assert (pixel_cache(root, index.assign(patient='x', split='test'), 32, folder=folder) == pixels).all() and len(calls) == 4, 'only paths and contents matter'
    assert fingerprint(index) == fingerprint(turned) != fingerprint(index[1:])

@pytest.mark.parametrize('how', ['changed', 'gone', 'a folder'])
def test_an_index_that_changed_under_the_cache(cache, how):
    root, index, folder, _ = cache
    path = root/index.path[3]
    path.unlink()
    if how == 'changed': path.write_bytes(encoded(gray(seed=99)))
    if how == 'a folder': path.mkdir()
    before = cached(folder)
    with pytest.raises(RuntimeError, match=f'{index.path[3]} (has changed since it was indexed|cannot be read any more.*): run 00_data again'):
        pixel_cache(root, index, 48, folder=folder)
    assert cached(folder) == before, 'nothing is left behind'

@pytest.mark.parametrize('damage', ['a bit', 'shorter', 'empty', 'gone', 'no array', 'meta cut', 'meta empty', 'meta gone', 'meta a list', 'meta of others', 'other shape'])
def test_a_damaged_cache_is_made_again(cache, monkeypatch, capsys, damage):
    root, index, folder, pixels = cache
    place = next(p for p in folder.iterdir() if p.is_dir())
    file, meta, calls = place/'pixels.npy', place/'meta.json', built(monkeypatch)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == 'a bit': file.write_bytes(content)
    if damage == 'shorter': file.write_bytes(content[:-50])
    if damage == 'empty': file.write_bytes(b'')
    if damage == 'gone': file.unlink()
    if damage == 'no array': file.write_bytes(b'pixels' * 100)
    if damage == 'other shape': np.save(file, pixels[:, :, :16])
    if damage == 'meta cut': meta.write_text(meta.read_text()[:40])
    if damage == 'meta empty': meta.write_text('')
    if damage == 'meta gone': meta.unlink()
    if damage == 'meta a list': meta.write_text('[]')
    if damage == 'meta of others': meta.write_text(meta.read_text().replace('stretch', 'pad'))
    assert (pixel_cache(root, index, 32, folder=folder) == pixels).all() and len(calls) == 1
    assert 'damaged and is made again' in capsys.readouterr().out and len(cached(folder)) == 1
    assert (pixel_cache(root, index, 32, folder=folder) == pixels).all() and len(calls) == 1

class Full:
    "A file on a disk with room for `room` bytes."
    def __init__(self, file, room): self.file, self.room = file, room
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        self.room -= len(content)
        if self.room < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        return self.file.write(content)

@pytest.mark.parametrize('room', [0, 200, 7000])
def test_full_disk_while_the_cache_is_written(root, tmp_path, monkeypatch, room):
    index, folder = index_images(root)[0], tmp_path/'caches'
    with monkeypatch.context() as m:
        m.setattr(images, 'open', lambda *a, **k: Full(open(*a, **k), room), raising=False)
        m.setattr(images, '_chunk', lambda size: 4)
        with pytest.raises(OSError, match=r'the disk is full: the pixel cache needs 0 MB; nothing was left behind.*CXR_LAB_CACHE') as e: pixel_cache(root, index, 32, folder=folder)
    assert e.value.errno == errno.ENOSPC and cached(folder) == []
    assert len(pixel_cache(root, index, 32, folder=folder)) == 12, 'and it works once there is room'

def test_full_disk_while_the_cache_is_flushed(root, tmp_path, monkeypatch):
    from cxr_lab import runs
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(runs.os, 'fsync', full)
    with pytest.raises(OSError, match='the disk is full: the pixel cache'): pixel_cache(root, index_images(root)[0], 32, folder=tmp_path/'caches')
    assert cached(tmp_path/'caches') == []

def test_other_errors_of_the_disk_are_not_called_full(root, tmp_path, monkeypatch):
    def broken(path, mode, **k):
        if mode == 'wb': raise OSError(errno.EIO, 'Input/output error')
        return open(path, mode, **k)
    monkeypatch.setattr(images, 'open', broken, raising=False)
    with pytest.raises(OSError, match='Input/output error'): pixel_cache(root, index_images(root)[0], 32, folder=tmp_path/'caches')
    assert cached(tmp_path/'caches') == []

def test_an_interrupted_build_leaves_nothing(root, tmp_path, monkeypatch):
    def interrupted(*a): raise KeyboardInterrupt
    monkeypatch.setattr(images, '_decode', interrupted)
    with pytest.raises(KeyboardInterrupt): pixel_cache(root, index_images(root)[0], 32, folder=tmp_path/'caches')
    assert cached(tmp_path/'caches') == []

def files_in(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def broken_files(root):
    "Two files that are left out, among the others in the order of paths."
    (root/'train'/'NORMAL'/'IM-0000-0000.jpeg').write_bytes(b'no image')
    (root/'train'/'PNEUMONIA'/'person1_virus_0.jpeg').write_bytes(encoded(gray(seed=7), 'JPEG')[:300])

@pytest.mark.parametrize('chunk,aspect', [(256, 'stretch'), (4, 'pad'), (5, 'crop'), (12, 'stretch')])
def test_one_pass_makes_the_same_index_and_the_same_cache(root, tmp_path, monkeypatch, chunk, aspect):
    broken_files(root)
    monkeypatch.setattr(images, '_chunk', lambda size: chunk)
    monkeypatch.setattr(images, 'code_of', lambda *roots: {})  # what counts below is no other code
    index, rejected = index_images(root)
    pixels = np.array(pixel_cache(root, index, 32, aspect, folder=tmp_path/'two'))
    opened, reader = [], images.open_image
    monkeypatch.setattr(images, 'open_image', lambda *a, **k: (opened.append(1), reader(*a, **k))[1])
    calls = built(monkeypatch)
    once = index_images(root, size=32, aspect=aspect, folder=tmp_path/'one')
    assert once[0].equals(index) and once[1].equals(rejected) and len(rejected) == 2
    assert files_in(tmp_path/'one') == files_in(tmp_path/'two') and len(files_in(tmp_path/'one')) == 3
    assert np.array_equal(pixel_cache(root, once[0], 32, aspect, folder=tmp_path/'one'), pixels)
    assert len(opened) == len(index) + 2 and not calls, 'each file is decoded once'

def test_pixels_are_those_of_the_code_that_reads(cache, monkeypatch, capsys):
    root, index, folder, pixels = cache
    original = images.square
    def inverted(gray, size, aspect='stretch'): return 255 - original(gray, size, aspect)
    with monkeypatch.context() as m:
        for module in (films, images): m.setattr(module, 'square', inverted)
        assert (pixel_cache(root, index, 32, folder=folder) == 255 - pixels).all()
    assert (pixel_cache(root, index, 32, folder=folder) == pixels).all() and 'damaged' not in capsys.readouterr().out

def test_pixels_from_before_a_fresh_start_are_decoded_again(cache, monkeypatch, capsys):
    root, index, folder, pixels = cache
    meta = next(folder.glob('*/meta.json'))
    with only_since(meta.stat().st_mtime + 1):
        os.utime(meta, (0, 0))
        assert (pixel_cache(root, index, 32, folder=folder) == pixels).all()
    made = next(folder.glob('*/meta.json')).stat().st_mtime
    assert made > 0 and 'damaged' not in capsys.readouterr().out

def test_one_pass_keeps_a_sound_cache_and_replaces_a_damaged_one(root, tmp_path, capsys):
    folder = tmp_path/'caches'
    index = index_images(root, size=32, folder=folder)[0]
    file = next(folder.glob('*/pixels.npy'))
    before = file.stat().st_ino
    index_images(root, size=32, folder=folder)
    assert file.stat().st_ino == before and len(cached(folder)) == 1
    content = bytearray(file.read_bytes()); content[-1] ^= 1; file.write_bytes(content)
    index_images(root, size=32, folder=folder)
    assert 'damaged and is made again' in capsys.readouterr().out
    assert (pixel_cache(root, index, 32, folder=folder)[-1] == read_pixels((root/index.path.iloc[-1]).read_bytes(), 32)).all()

@pytest.mark.parametrize('why', ['layout', 'disk', 'interrupt', 'names'])
def test_one_pass_that_fails_leaves_nothing(root, tmp_path, monkeypatch, why):
    folder, fails = tmp_path/'caches', (ValueError, 'holds no readable image')
    if why == 'layout': shutil.rmtree(root/'test'/'NORMAL'); (root/'test'/'NORMAL').mkdir()
    if why == 'names': (root/'train'/'NORMAL'/'holiday.jpeg').write_bytes(encoded(gray(seed=1))); fails = ValueError, 'does not name a patient'
    if why == 'disk':
        monkeypatch.setattr(images, 'open', lambda *a, **k: Full(open(*a, **k), 7000), raising=False)
        monkeypatch.setattr(images, '_chunk', lambda size: 4)
        fails = OSError, 'the disk is full: the pixel cache needs'
    if why == 'interrupt':
        def interrupted(*a): raise KeyboardInterrupt
        monkeypatch.setattr(images, 'square', interrupted)
        fails = KeyboardInterrupt, None
    with pytest.raises(fails[0], match=fails[1]): index_images(root, size=32, folder=folder)
    assert cached(folder) == []

def test_one_pass_refuses_impossible_sizes_before_it_reads(root, monkeypatch):
    monkeypatch.setattr(images, '_inspect', None)
    with pytest.raises(ValueError, match='image_size=8: 16 to 2048'): index_images(root, size=8)
    with pytest.raises(ValueError, match="aspect='squash'"): index_images(root, size=32, aspect='squash')

def test_impossible_sizes(root):
    index = index_images(root)[0]
    for size in (0, 15, 2049, -1):
        with pytest.raises(ValueError, match='image_size=.*16 to 2048'): pixel_cache(root, index, size)
    with pytest.raises(ValueError, match="aspect='squash'"): pixel_cache(root, index, 32, 'squash')

def python(code, *args, **env):
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)

def test_two_processes_share_one_cache(root, tmp_path):
    index_images(root)[0].to_csv(tmp_path/'index.csv', index=False)
    code = """
        import sys, time, pandas as pd
        from pathlib import Path
        from cxr_lab import images
        root, table, folder = map(Path, sys.argv[1:])
        build = images._build_cache
        def slow(*a): print('built'); time.sleep(1); return build(*a)
        images._build_cache = slow
        index = pd.read_csv(table, keep_default_na=False)
        (table.parent/f'ready{time.time_ns()}').touch()
        while not (table.parent/'go').exists(): time.sleep(.01)
        print(images.pixel_cache(root, index, 32, folder=folder).sum())
    """
    both = [python(code, root, tmp_path/'index.csv', tmp_path/'caches') for _ in range(2)]
    while len(list(tmp_path.glob('ready*'))) < 2 and all(p.poll() is None for p in both): time.sleep(.05)
    (tmp_path/'go').touch()
    out = [p.communicate(timeout=300) for p in both]
    assert all(p.returncode == 0 for p in both), out
    lines = sorted(o.split() for o, _ in out)
    assert lines[0][-1] == lines[1][-1] and sorted(map(len, lines)) == [1, 2], lines  # one built, both read
    assert len(cached(tmp_path/'caches')) == 1

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the memory of a process from /proc')
def test_data_of_many_times_the_memory(tmp_path):
    "Building, checking and reading a cache of 420 MB takes a small part of that as memory of the process's own; the rest are pages the system may drop."
    code = """
        import sys, threading, time, numpy as np, pandas as pd
        from pathlib import Path
        from cxr_lab import images
        from cxr_lab.data import Dataset
        from cxr_lab.trainer import make_loader
        def own(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) / 1024
        root, n, peak, done = Path(sys.argv[1]), 1600, [0], threading.Event()
        rng = np.random.default_rng(0)
        content = images.Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8))
        root.mkdir(); content.save(root/'one.png')
        sha = images.hashlib.sha256((root/'one.png').read_bytes()).hexdigest()
        for i in range(n): (root/f'{i}.png').hardlink_to(root/'one.png')
        index = pd.DataFrame(dict(path=[f'{i}.png' for i in range(n)], sha256=sha, split='train', label=np.arange(n) % 2))
        def watch():
            while not done.is_set(): peak[0] = max(peak[0], own()); time.sleep(.005)
        before = own()
        threading.Thread(target=watch).start()
        try:
            pixels = images.pixel_cache(root, index, 512, folder=root/'cache', workers=2)
            seen = sum(len(x) for x, y in make_loader(Dataset(index, pixels, None), 'train', 16, shuffle_seed=0))
        finally: done.set()
        print(seen, pixels.nbytes / 2**20, peak[0] - before)
    """
    p = python(code, tmp_path/'images')
    out, err = p.communicate(timeout=600)
    shutil.rmtree(tmp_path/'images')
    assert p.returncode == 0, err
    seen, size, used = map(float, out.split())
    assert seen == 1600 and size == 400 and used < 200, f'{used:.0f} MB for a cache of {size:.0f} MB'

def test_a_chunk_is_bounded_in_bytes(tmp_path, monkeypatch):
    "At the largest size, one image has 4 MB: what is held at once must not grow with it."
    monkeypatch.setattr(images, '_decode', lambda root, size, aspect, row: np.zeros((1, size, size), np.uint8))
    held, write = [], np.lib.format.write_array_header_1_0
    class Watched(Full):
        def write(self, content): held.append(len(content)); return len(content)
    monkeypatch.setattr(images, 'open', lambda *a, **k: Watched(open(*a, **k), 0), raising=False)
    index = pd.DataFrame(dict(path=[f'{i}' for i in range(60)], sha256='x'))
    images._build_cache(tmp_path, index, 2048, 'stretch', 2, tmp_path)
    assert sum(held) > 60 * 2**22 and max(held) <= 64 * 2**20


# find_data

def test_find_data_folder_and_masks(root, tmp_path):
    source = find_data(str(root))
    assert (source.kind, source.images, source.lung_masks) == ('folder', root, None)
    (tmp_path/'study').mkdir(); root.rename(tmp_path/'study'/'chest_xray'); (tmp_path/'study'/'lung_masks').mkdir()
    source = find_data(str(tmp_path/'study'))
    assert (source.kind, source.images, source.lung_masks) == ('folder', tmp_path/'study'/'chest_xray', tmp_path/'study'/'lung_masks')

def test_pictures_of_a_source(root):
    "Whatever else lies in the folder; and where there is none, it is said as the index says it."
    source = find_data(str(root))
    folder = root/'train'/'NORMAL'
    (folder/'.DS_Store').write_bytes(b'x')
    (folder/'.ipynb_checkpoints').mkdir()
    (folder/'IM-0000-0000.jpeg').write_bytes(b'no image')
    pictures = list(source.pictures('train', 'NORMAL'))
    assert [(p.mode, p.size) for p in pictures] == [('L', (40, 30))] * 3
    for p in folder.glob('*.jpeg'): p.write_bytes(b'')
    with pytest.raises(ValueError, match='images/train/NORMAL/ holds no readable image'):
        next(source.pictures('train', 'NORMAL'))
    with pytest.raises(FileNotFoundError, match='images/val/NORMAL/ is missing; the layout is'):
        next(source.pictures('val', 'NORMAL'))
    assert repr(source) == "Source('folder', images/)"

def test_find_data_never_falls_back(tmp_path, monkeypatch):
    monkeypatch.setattr('cxr_lab.phantom.write_phantoms', lambda *a, **k: pytest.fail('phantoms instead of what was asked for'))
    monkeypatch.setattr(images, 'fetch', lambda name: Path('fetched')/name)
    monkeypatch.delenv('CXR_LAB_DATA', raising=False)
    assert find_data('kermany').images == Path('fetched/kermany') and find_data('pneumoniamnist').kind == 'pneumoniamnist'
    monkeypatch.setenv('CXR_LAB_DATA', str(tmp_path/'wrong'))
    with pytest.raises(FileNotFoundError, match='CXR_LAB_DATA names a folder without chest_xray/.*correct it, or unset it'): find_data('kermany')
    with pytest.raises(FileNotFoundError, match="data='kermani' is neither phantom, kermany, pneumoniamnist nor a folder"): find_data('kermani')
    layout(tmp_path/'right'/'chest_xray')
    monkeypatch.setenv('CXR_LAB_DATA', str(tmp_path/'right'))
    assert find_data('kermany').images == tmp_path/'right'/'chest_xray' and find_data('kermany').kind == 'kermany'
    def offline(name): raise OSError('no network')
    monkeypatch.delenv('CXR_LAB_DATA'); monkeypatch.setattr(images, 'fetch', offline)
    with pytest.raises(OSError, match='no network'): find_data('kermany')

def test_find_data_phantoms(monkeypatch, tmp_path):
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path))
    source = find_data('phantom', 8, 5)
    assert source.kind == 'phantom' and source.lung_masks.is_dir() and source.opacity_masks.is_dir() and tmp_path in source.images.parents
    assert find_data('phantom', 8, 5) == source != find_data('phantom', 8, 6)
    assert check_no_leakage(index_images(source.images)[0]) > 8


# Downloads, from a server on this machine

class Server(http.server.ThreadingHTTPServer):
    "Serves `content`; `behavior` says how badly."
    daemon_threads = True
    def __init__(self, content):
        self.content, self.requests, self.ranges, self.cut, self.status = content, [], True, None, None
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_address[1]}/file.zip'

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s, asked = self.server, self.headers.get('Range')
        s.requests.append(asked)
        if s.status: return self.send_error(s.status)
        start = int(asked.split('=')[1].split('-')[0]) if asked and s.ranges else 0
        if asked and s.ranges and start >= len(s.content):
            self.send_response(416); self.send_header('Content-Length', '0'); return self.end_headers()
        body = s.content[start:]
        self.send_response(206 if asked and s.ranges else 200)
        self.send_header('Content-Length', str(len(body)))
        if asked and s.ranges: self.send_header('Content-Range', f'bytes {start}-{len(s.content) - 1}/{len(s.content)}')
        self.end_headers()
        cut, s.cut = s.cut, None
        self.wfile.write(body[:cut])
        self.close_connection = True

@pytest.fixture
def archive(tmp_path):
    "A ZIP file of 4 MB in the layout of the data."
    file, rng = tmp_path/'made.zip', np.random.default_rng(0)
    with zipfile.ZipFile(file, 'w') as z:
        for split in ('train', 'test'):
            for c in CLASSES: z.writestr(f'chest_xray/{split}/{c}/{NAMES[c].format(1)}', rng.bytes(1 << 20))
    return file

@pytest.fixture
def server(archive, monkeypatch):
    server = Server(archive.read_bytes())
    serve(monkeypatch, server, 'sha256:' + hashlib.sha256(server.content).hexdigest())
    yield server
    server.shutdown(); server.server_close()

def serve(monkeypatch, server, checksum, **info):
    monkeypatch.setitem(images.DATASETS, 'kermany', images.DATASETS['kermany'] | dict(url=server.url, checksum=checksum, file='file.zip', train=2, val=0, test=2) | info)

def test_download_unpack_and_reuse(server, tmp_path):
    said = io.StringIO()
    pooch.get_logger().addHandler(handler := logging.StreamHandler(said))
    images = fetch('kermany', tmp_path/'d')
    assert sorted(p.relative_to(images).parts[0] for p in images.rglob('*.jpeg')) == ['test', 'test', 'train', 'train']
    assert server.requests == [None] and fetch('kermany', tmp_path/'d') == images and len(server.requests) == 1
    assert sorted(p.name for p in (tmp_path/'d').iterdir()) == ['file.zip', 'kermany']
    pooch.get_logger().removeHandler(handler)
    assert said.getvalue() == '', 'pooch logs to stderr, with the path of this machine: it would end up in a notebook'

def test_broken_connection_is_resumed(server, tmp_path):
    server.cut = 3_000_000
    with pytest.raises(OSError, match='[Tt]ry again|the next try continues'): fetch('kermany', tmp_path/'d')
    assert not (tmp_path/'d/kermany').exists() and not (tmp_path/'d/file.zip').exists()
    have = (tmp_path/'d/file.zip.part').stat().st_size
    assert 0 < have <= 3_000_000
    assert fetch('kermany', tmp_path/'d').is_dir()
    assert server.requests == [None, f'bytes={have}-'] and not (tmp_path/'d/file.zip.part').exists()
    assert (tmp_path/'d/file.zip').read_bytes() == server.content

def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.cut, server.ranges = 3_000_000, False
    with pytest.raises(OSError): fetch('kermany', tmp_path/'d')
    assert fetch('kermany', tmp_path/'d').is_dir() and (tmp_path/'d/file.zip').read_bytes() == server.content

def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d/file.zip.part').write_bytes(server.content + b'more')
    with pytest.raises(OSError): fetch('kermany', tmp_path/'d')
    assert fetch('kermany', tmp_path/'d').is_dir()

def test_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    serve(monkeypatch, server, 'md5:' + '0' * 32)
    with pytest.raises(ValueError, match='hash'): fetch('kermany', tmp_path/'d')
    assert not (tmp_path/'d/kermany').exists() and not (tmp_path/'d/file.zip').exists() and not (tmp_path/'d/file.zip.part').exists()

def test_a_part_of_another_file_does_not_pass(server, tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d/file.zip.part').write_bytes(b'x' * 1000)
    with pytest.raises(ValueError, match='hash'): fetch('kermany', tmp_path/'d')
    assert fetch('kermany', tmp_path/'d').is_dir(), 'the next try starts over'

@pytest.mark.parametrize('status', [403, 404, 500])
def test_server_errors_say_what_to_do(server, tmp_path, status):
    server.status = status
    with pytest.raises(OSError, match='could not be downloaded.*HTTPError.*get it by hand from'): fetch('kermany', tmp_path/'d')
    assert not (tmp_path/'d/kermany').exists()

def test_offline(server, tmp_path):
    server.shutdown(); server.server_close()
    with pytest.raises(OSError, match='could not be downloaded.*is there a network'): fetch('kermany', tmp_path/'d')

def test_other_counts_than_published_are_refused_every_time(server, tmp_path, monkeypatch):
    serve(monkeypatch, server, None, train=3)
    for _ in range(2):
        with pytest.raises(ValueError, match="found {'train': 2, 'val': 0, 'test': 2} images, published are {'train': 3"): fetch('kermany', tmp_path/'d')

def test_unknown_data_set():
    with pytest.raises(ValueError, match="unknown data set 'chexpert'; known: kermany, pneumoniamnist"): fetch('chexpert')

def test_pneumoniamnist_becomes_the_layout(tmp_path, monkeypatch):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    arrays = {f'{s}_images': rng.integers(0, 255, (4, 28, 28), np.uint8) for s in FOLDERS} | {f'{s}_labels': np.array([[0], [1], [1], [0]]) for s in FOLDERS}
    np.savez(buffer, **arrays)
    server = Server(buffer.getvalue())
    monkeypatch.setitem(images.DATASETS, 'pneumoniamnist', images.DATASETS['pneumoniamnist'] | dict(url=server.url, checksum='md5:' + hashlib.md5(server.content).hexdigest(), train=4, val=4, test=4))
    index, rejected = index_images(fetch('pneumoniamnist', tmp_path), 'image')
    server.shutdown(); server.server_close()
    assert len(index) == 12 and not len(rejected)
    for split in FOLDERS:
        rows = index[index.split == split]
        for label, path in zip(rows.label, rows.path):
            i = int(Path(path).stem[-5:])
            assert label == arrays[f'{split}_labels'][i, 0] and (np.asarray(Image.open(tmp_path/'pneumoniamnist'/path)) == arrays[f'{split}_images'][i]).all()


# Archives

def zipped(path, members, **options):
    with zipfile.ZipFile(path, 'w', **options) as z:
        for name, content in members.items(): z.writestr(name, content)
    return path

def test_only_images_leave_an_archive(tmp_path):
    outside = ['../train/NORMAL/a.jpeg', '/train/NORMAL/a.jpeg', '../../chest_xray/train/NORMAL/a.jpeg', 'train/NORMAL/../../../a.jpeg', 'train\\NORMAL\\a.jpeg', 'train/NORMAL/..\\a.jpeg',
               'train/NORMAL/sub/a.jpeg', 'train/OTHER/a.jpeg', 'train/NORMAL/a.exe', 'train/NORMAL/a.jpeg/', 'C:/train/NORMAL/a.jpeg', '__MACOSX/chest_xray/train/NORMAL/._a.jpeg', 'train/NORMAL/._a.jpeg',
               'chest_xray/chest_xray/train/NORMAL/a.jpeg']
    good = ['train/NORMAL/IM-1-1.jpeg', 'chest_xray/train/PNEUMONIA/person1_virus_1.JPG', 'chest_xray/test/normal/b.png']
    file = zipped(tmp_path/'a.zip', {name: b'pixels' for name in outside + good})
    assert unpack_images(file, tmp_path/'box'/'images') == {'train/NORMAL': 1, 'train/PNEUMONIA': 1, 'test/NORMAL': 1}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file() and p != file) == [
        'box/images/test/NORMAL/b.png', 'box/images/train/NORMAL/IM-1-1.jpeg', 'box/images/train/PNEUMONIA/person1_virus_1.JPG']

def test_a_link_in_an_archive_stays_bytes(tmp_path):
    link = zipfile.ZipInfo('train/NORMAL/link.jpeg'); link.external_attr = 0o120777 << 16; link.create_system = 3
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(link, '/etc/passwd')
    unpack_images(tmp_path/'a.zip', tmp_path/'images')
    assert not (tmp_path/'images/train/NORMAL/link.jpeg').is_symlink()

def test_a_bomb_is_refused(tmp_path):
    file = zipped(tmp_path/'a.zip', {'train/NORMAL/a.jpeg': bytes(65 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with pytest.raises(ValueError, match='train/NORMAL/a.jpeg claims 68,157,440 bytes'): unpack_images(file, tmp_path/'images')
    assert sorted(os.listdir(tmp_path)) == ['a.zip']

def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path):
    file = zipped(tmp_path/'a.zip', {'train/NORMAL/a.jpeg': bytes(65 << 20)}, compression=zipfile.ZIP_DEFLATED)
    true, lie = (65 << 20).to_bytes(4, 'little'), (1000).to_bytes(4, 'little')
    assert file.read_bytes().count(true) == 2
    file.write_bytes(file.read_bytes().replace(true, lie))
    with pytest.raises(ValueError, match='damaged'): unpack_images(file, tmp_path/'images')
    assert sorted(os.listdir(tmp_path)) == ['a.zip']

def test_a_bomb_of_many_parts_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    "Each member below the limit, and all of them far too much; what is not taken does not count."
    file = zipped(tmp_path/'a.zip', {'train/NORMAL/a.jpeg': bytes(5000), 'test/NORMAL/b.jpeg': bytes(5001), 'film.mp4': bytes(90_000)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(images, '_LARGEST_ARCHIVE', 10_000)
    monkeypatch.setattr(zipfile.ZipFile, 'read', lambda *a: pytest.fail('it was unpacked'))
    with pytest.raises(ValueError, match='a.zip claims to unpack to 10,001 bytes, more than 10,000'): unpack_images(file, tmp_path/'images')
    assert sorted(os.listdir(tmp_path)) == ['a.zip']
    monkeypatch.undo()
    monkeypatch.setattr(images, '_LARGEST_ARCHIVE', 10_001)
    assert unpack_images(file, tmp_path/'images') == {'train/NORMAL': 1, 'test/NORMAL': 1}

@pytest.mark.parametrize('how', ['cut', 'flipped', 'empty', 'text', 'no images', 'with a password'])
def test_a_damaged_archive_is_refused(tmp_path, how):
    file = zipped(tmp_path/'a.zip', {'train/NORMAL/a.jpeg': b'pixels' * 100, 'train/NORMAL/b.jpeg': b'pixels' * 100})
    content = bytearray(file.read_bytes())
    if how == 'cut': content = content[:-60]
    if how == 'flipped': content[100] ^= 1
    if how == 'empty': content = b''
    if how == 'text': content = b'<html>not found</html>'
    if how == 'with a password':
        for at in (content.find(b'PK\3\4') + 6, content.find(b'PK\1\2') + 8): content[at] |= 1
    file.write_bytes(content)
    if how == 'no images': zipped(file, {'readme.txt': b'x'})
    with pytest.raises(ValueError, match='holds no' if how == 'no images' else 'a.zip is damaged|password'): unpack_images(file, tmp_path/'images')
    assert sorted(os.listdir(tmp_path)) == ['a.zip']


# The real images

@pytest.fixture(scope='module')
def real_index(real_data): return index_images(real_data/'chest_xray')

def test_real_counts(real_index):
    index, rejected = real_index
    counts = index.groupby(['split', 'label']).size()
    assert {s: (counts[s, 0], counts[s, 1]) for s in FOLDERS} == {'train': (1341, 3875), 'val': (8, 8), 'test': (234, 390)} and not len(rejected)

def test_real_identical_files(real_index):
    index, _ = real_index
    same = index[index.duplicated('sha256', keep=False)]
    assert same.sha256.nunique() == 30 and index.duplicated('sha256').sum() == 32
    assert (same.groupby('sha256')[['split', 'label', 'patient']].nunique() == 1).all(axis=None)

def test_real_masks_pair_with_images(real_data, real_index):
    masks = {p.relative_to(real_data/'lung_masks').with_suffix('.jpeg').as_posix() for p in (real_data/'lung_masks').rglob('*.png')}
    if not masks: pytest.skip('no lung masks beside the images')
    assert len(masks) == 5163 and masks <= set(real_index[0].path)
