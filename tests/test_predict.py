"Predictions on files of one's own: the same as the lessons', one row for every file, and nothing lost or half written when a run ends early."
import csv, io, json, os, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from PIL import Image
from threadpoolctl import threadpool_info

from cxr_lab import predict as P
from cxr_lab.data import Dataset, split_validation
from cxr_lab.films import Refused, square
from cxr_lab.gradcam import explain as gradcam_explain
from cxr_lab.images import Source, pixel_cache
from cxr_lab.masked import look_at_all
from cxr_lab.model import build_model, load_model, overfit_one_batch, save_model
from cxr_lab.runs import CLASSES, read_json, read_predictions, write_json
from cxr_lab.train import predict as lesson_predict

INFO = dict(model='small', image_size=32, aspect='stretch', threshold=.45, trained_on='phantom')

@cache
def _trained():
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(64, 1, 4, 4), (32, 32), mode='bilinear')
    net = build_model('small')
    overfit_one_batch(net, x, (x[:, 0, :, :16].mean((1, 2)) > x[:, 0, :, 16:].mean((1, 2))).long(), 30)
    return net.eval()

def network():
    "Tells which half is brighter: its answers differ from film to film."
    return deepcopy(_trained())

def saved(path, net=None, **info):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, net or network(), INFO | info)
    return path

@pytest.fixture(scope='module')
def model(tmp_path_factory): return saved(tmp_path_factory.mktemp('model')/'model.safetensors')

@pytest.fixture(scope='module')
def predictor(model): return P.Predictor.load(model, device='cpu')

@pytest.fixture(scope='module')
def films(tmp_path_factory, phantom_images):
    "Eleven films in two folders with the same names, and two files that are none."
    root = tmp_path_factory.mktemp('films')
    files = sorted((phantom_images/'test').rglob('*.jpeg'))
    for i in range(11):
        target = root/'ab'[i % 2]/f'film {i // 2}.jpeg'
        target.parent.mkdir(exist_ok=True)
        shutil.copy(files[3 * i], target)
    (root/'a'/'cut.jpeg').write_bytes(files[0].read_bytes()[:600])
    (root/'b'/'page.png').write_text('<html>404</html>')
    return root

# --- the same as the lessons

def test_same_as_the_pixel_cache_and_lesson_03(tmp_path, phantom_images, phantom_index, predictor):
    index = phantom_index.iloc[::7]
    pixels = pixel_cache(phantom_images, index, 32, folder=tmp_path)
    table = predictor.predict([phantom_images/p for p in index.path], batch_size=5)
    assert np.ptp(table.probability) > .2, 'answers that do not differ prove nothing'
    np.testing.assert_allclose(table.probability, lesson_predict(predictor.network, pixels), atol=1e-6)
    assert table.label.tolist() == [CLASSES[int(p >= .45)] for p in table.probability] and (table.threshold == .45).all()
    assert not table[['warning', 'error', 'notes']].any().any() and list(table) == list(P.ROW)

@pytest.mark.parametrize('aspect', ['stretch', 'pad', 'crop'])
def test_large_jpegs_are_decoded_as_in_lesson_00(tmp_path, aspect, phantom_images, phantom_index):
    from cxr_lab.data import index_images
    root, index = tmp_path/'images', phantom_index.groupby(['split', 'label']).head(2)
    for p in index.path:
        (root/p).parent.mkdir(parents=True, exist_ok=True)
        Image.open(phantom_images/p).resize((1500, 1100)).save(root/p, quality=92)
    index = index_images(root)[0]
    predictor = P.Predictor.load(saved(tmp_path/'model.safetensors', aspect=aspect))
    expected = lesson_predict(predictor.network, pixel_cache(root, index, 32, aspect, folder=tmp_path/'cache'))
    np.testing.assert_allclose(predictor.predict([root/p for p in index.path]).probability, expected, atol=1e-5)
    assert predictor.explain(root/index.path[0]).probability == pytest.approx(expected[0], abs=1e-5)

@pytest.fixture(scope='session')
def study(repo, real_data):
    if not (repo/'runs'/'study'/'run.json').is_file(): pytest.skip('the run of the committed study is not here (runs/study)')
    return repo/'runs'/'study'

def spread(study, place, n):
    "n test images over the range of probabilities that the run found for them."
    df = read_predictions(study/place/'predictions.csv').query("split == 'test'").sort_values('probability')
    return df.iloc[np.linspace(0, len(df) - 1, n).astype(int)]

@pytest.mark.parametrize('place', ['03_train/seed_0', '04_augment/seed_0'])
def test_sixteen_real_images_as_the_study_scored_them(study, real_data, place):
    df = spread(study, place, 16)
    found = P.Predictor.load(study/place, device='cpu').predict([real_data/'chest_xray'/p for p in df.path])
    np.testing.assert_allclose(found.probability, df.probability, atol=1e-5)

@pytest.mark.parametrize('view', ['lungs', 'crop'])
def test_models_of_lesson_08_find_their_view_themselves(study, real_data, view):
    df = spread(study, f'08_masked/{view}/seed_0', 4)
    predictor = P.Predictor.load(study/'08_masked'/view, device='cpu')
    assert predictor.view == view
    np.testing.assert_allclose(predictor.predict([real_data/'chest_xray'/p for p in df.path]).probability, df.probability, atol=1e-5)

def test_dicom_and_png_of_one_array_agree(tmp_path, predictor):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    a = np.random.default_rng(0).integers(0, 256, (70, 50), dtype=np.uint8)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.1.1', '1.2.3'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PatientName = *a.shape, 1, 'MONOCHROME2', 'Secret^Name'
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = 7, 0, a.tobytes()
    ds.save_as(tmp_path/'a.dcm', enforce_file_format=True)
    Image.fromarray(a).save(tmp_path/'b.png')
    told = P.predict_files(predictor, [tmp_path/'a.dcm', tmp_path/'b.png', a], tmp_path/'out')
    table = P.read_table(tmp_path/'out'/'predictions.csv')
    assert told['counts']['read'] == 3 and table.probability.nunique() == 1
    assert not any(b'Secret' in f.read_bytes() for f in (tmp_path/'out').rglob('*') if f.is_file())

# --- which model, and what is wrong with it

def test_a_run_means_its_reference_model(tmp_path):
    for place in ('03_train/seed_0', '04_augment/seed_10', '04_augment/seed_2', '08_masked/lungs/seed_0'): saved(tmp_path/'run'/place/'model.safetensors')
    def of(p): return P.find_model(p).relative_to(tmp_path/'run').parent.as_posix()
    assert of(tmp_path/'run') == '04_augment/seed_2' and of(tmp_path/'run'/'08_masked'/'lungs') == '08_masked/lungs/seed_0'
    shutil.rmtree(tmp_path/'run'/'04_augment')
    assert of(tmp_path/'run') == '03_train/seed_0' == of(tmp_path/'run'/'03_train'/'seed_0')
    with pytest.raises(FileNotFoundError, match='no model file'): P.find_model(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='holds no model'): P.find_model(tmp_path)

def test_files_that_are_no_model(tmp_path):
    import pickle
    from safetensors.torch import save_file
    bad = {'pickle.pt': 'no safetensors', 'cut.safetensors': 'no safetensors', 'foreign.safetensors': 'not a cxr_lab model'}
    (tmp_path/'pickle.pt').write_bytes(pickle.dumps({'weights': 1}))
    (tmp_path/'cut.safetensors').write_bytes(saved(tmp_path/'whole.safetensors').read_bytes()[:5000])
    save_file({'w': torch.zeros(3)}, tmp_path/'foreign.safetensors')
    for name, match in bad.items():
        with pytest.raises(ValueError, match=match): P.Predictor.load(tmp_path/name)
    broken = network()
    broken.head.weight.data[0, 0] = torch.nan
    for match, options in {'not finite': dict(net=broken), 'image_size=None': dict(image_size=None), "aspect='wide'": dict(aspect='wide'), 'no threshold': dict(threshold=None), 'heart': dict(recipe=dict(input='heart'))}.items():
        with pytest.raises(ValueError, match=match): P.Predictor.load(saved(tmp_path/'m.safetensors', **options))
    assert P.Predictor.load(saved(tmp_path/'m.safetensors', threshold=None), threshold='0.5').threshold == .5

@pytest.mark.parametrize('threshold', [0, 1, -1, '90', 'often', float('nan')])
def test_thresholds_that_are_none(model, threshold):
    with pytest.raises(ValueError, match="between 0 and 1, or 'validation'"): P.Predictor.load(model, threshold=threshold)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_device_that_is_not_there(model):
    with pytest.raises(ValueError, match='no CUDA device'): P.Predictor.load(model, device='cuda')

# --- explanations

def test_the_map_is_lesson_06s(predictor, films):
    path = films/'a'/'film 0.jpeg'
    e = predictor.explain(path)
    pixels = square(Image.open(path), 32)[None]
    expected = gradcam_explain(predictor.network, pixels, CLASSES.index(e.label))
    np.testing.assert_allclose(e.raw, expected.raw[0], atol=1e-6)
    assert e.explained == e.label and e.gray.shape == (64, 64) == e.heat.shape and e.overlay.shape == (64, 64, 3) and e.outline is None
    assert e.zero or e.heat.max() == pytest.approx(1, abs=.1)
    assert predictor.explain(path.read_bytes()).probability == e.probability == predictor.explain(np.asarray(Image.open(path))).probability

def test_the_class_called_at_the_threshold_is_explained(model, films):
    path = films/'b'/'film 1.jpeg'
    p = P.Predictor.load(model).explain(path).probability
    assert 0 < p < 1
    low, high = (P.Predictor.load(model, threshold=t).explain(path) for t in (p * .9, p + .1 * (1 - p)))
    assert (low.explained, high.explained) == ('PNEUMONIA', 'NORMAL') and not np.array_equal(low.raw, high.raw)
    assert np.array_equal(low.raw, P.Predictor.load(model).explain(path, target=1).raw)

def test_an_empty_map_is_said_to_be_empty(tmp_path, films):
    net = network()
    net.head.weight.data.zero_()
    e = P.Predictor.load(saved(tmp_path/'m.safetensors', net)).explain(films/'a'/'film 0.jpeg')
    assert e.zero and 'empty heatmap' in e.notes and not e.heat.any() and np.array_equal(e.overlay, np.repeat(e.gray[..., None], 3, 2))

@pytest.mark.parametrize('aspect', ['stretch', 'pad', 'crop'])
@pytest.mark.parametrize('frame', [(90, 60), (60, 91), (64, 64)])
def test_to_frame_undoes_square(aspect, frame):
    w, h = frame
    y, x = np.mgrid[:h, :w]
    picture = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 11)).astype(np.uint8)
    back, side = P.to_frame(square(Image.fromarray(picture), 256, aspect)[0], frame, aspect), min(w, h)
    inside = np.zeros((h, w), bool)
    if aspect == 'crop': inside[(h - side) // 2:(h - side) // 2 + side, (w - side) // 2:(w - side) // 2 + side] = True
    else: inside[:] = True
    assert back.shape == (h, w) and not back[~inside].any() and np.abs(back - picture)[inside].mean() < 4

def test_long_pictures_keep_their_proportions(predictor):
    e = predictor.explain(np.tile(np.arange(250, dtype=np.uint8), (2000, 1)), view=400)
    assert e.gray.shape == (400, 50) == e.heat.shape

class Lungs:
    "Stands for the U-Net: a rectangle, or nothing for a black image."
    digest, card = 'lungs', dict(limits=dict(area=[.05, .9], aspect=[.3, 3], balance=[.3, 1]))
    def __call__(self, pixels):
        masks = np.zeros((len(pixels), 256, 256), np.float32)
        masks[:, 60:200, 40:220] = 1
        return masks * pixels.any((1, 2, 3))[:, None, None]

@pytest.mark.parametrize('view', ['lungs', 'crop', 'removed', 'silhouette'])
def test_views_are_cut_out_as_in_lesson_08(tmp_path, films, view):
    predictor = P.Predictor.load(saved(tmp_path/'m.safetensors', recipe=dict(input=view, margin=.05)))
    predictor._segmenter = lungs = Lungs()
    paths = sorted(films.rglob('film*'))
    fine = np.stack([square(Image.open(p), 256) for p in paths])
    seen = torch.from_numpy(look_at_all(fine, lungs(fine)[:, None] > .5, view, 32, .05))
    with torch.inference_mode():  # exactly: two sums in float32 differ from each other by twice as much
        expected = deepcopy(predictor.network).double().eval()(seen.double() / 255).softmax(1)[:, 1].numpy()
    table = predictor.predict([*paths, np.zeros((80, 80), np.uint8)])
    np.testing.assert_allclose(table.probability[:-1], expected, atol=1e-6)
    assert not table.warning[:-1].any() and table.warning.iloc[-1] == 'no plausible lungs (empty), the whole image was used'
    e = predictor.explain(paths[0])
    assert e.heat.shape == (64, 64) and e.outline is None
    if view == 'crop': assert not e.heat[:5].any() and not e.heat[:, :3].any()  # outside of the box: nothing was seen there

def test_lungs_are_drawn_and_judged_if_asked(model, films, tmp_path):
    predictor = P.Predictor.load(model, segment=True)
    predictor._segmenter = Lungs()
    e = predictor.explain(films/'a'/'film 0.jpeg')
    assert e.outline.shape == e.gray.shape and e.outline.mean() == pytest.approx(140 * 180 / 256**2, abs=.03) and not e.warning
    assert not np.array_equal(e.overlay, P.overlay(e.gray, e.heat))
    assert predictor.predict(np.zeros((50, 50), np.uint8)).warning[0] == 'no plausible lungs (empty)'
    assert P.predict_files(predictor, films, tmp_path)['settings']['lungs'] == 'lungs'

# --- inputs

def test_every_input_has_a_row(predictor, films):
    table = predictor.predict(films, batch_size=3)
    assert len(table) == 13 and [Path(p).relative_to(films).as_posix() for p in table.path[table.error != '']] == ['a/cut.jpeg', 'b/page.png']
    assert table.probability[table.error != ''].isna().all() and not table.label[table.error != ''].any() and table.probability[table.error == ''].between(0, 1).all()
    assert predictor.predict([]).empty and len(predictor.predict(films/'a'/'cut.jpeg')) == 1
    assert predictor.predict([films/'nowhere.jpeg', films/'a'/'film 0.jpeg']).error.astype(bool).tolist() == [True, False]

def test_arrays_and_bytes(predictor):
    a = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(a).save(buffer, 'PNG')
    table = predictor.predict([a, a[None], buffer.getvalue(), np.dstack([a] * 3), a.astype(float), np.zeros((2, 3, 4, 5), np.uint8)])
    assert table.path.tolist() == [f'image {i}' for i in range(6)] and (abs(table.probability[:4] - table.probability[0]) < 1e-6).all()
    assert 'floating-point' in table.error[4] or 'no image' in table.error[4]
    assert 'no image' in table.error[5]
    assert len(predictor.predict(np.stack([a, a])[:, None])) == 2, '(N,1,H,W)'
    for wrong in (None, [3]):
        with pytest.raises(TypeError, match='image|iterable'): predictor.predict(wrong)

def test_a_bug_in_a_reader_costs_one_row_and_quotes_nothing(predictor, films, monkeypatch):
    read = P.read_film
    def faulty(source, **options):
        if 'film 2' in str(source): raise KeyError('Secret^Name')
        return read(source, **options)
    monkeypatch.setattr(P, 'read_film', faulty)
    table = predictor.predict(films/'a')
    assert table.error[table.path.str.contains('film 2')].tolist() == ['cannot be read (unexpected KeyError)'] and (table.error == '').sum() == 5

def test_reading_ahead_is_bounded(predictor, monkeypatch):
    started, finished = [0], [0]
    read = predictor._read
    def counted(*a): started[0] += 1; return read(*a)
    monkeypatch.setattr(predictor, '_read', counted)
    images = (np.full((8, 8), i, np.uint8) for i in range(100))
    for answers in predictor._stream(P._sources(images), batch_size=4, workers=2):
        finished[0] += len(answers)
        assert started[0] <= finished[0] + 4 * (2 + 1), 'a batch for each of two threads, and one in waiting'
    assert finished[0] == 100
    assert next(images, None) is None

# --- what is usual for a model of one's own

@pytest.fixture
def run(tmp_path, phantom_images, phantom_index):
    "A run folder as lessons 00 and 04 leave it."
    folder = tmp_path/'run'
    saved(folder/'04_augment'/'seed_0'/'model.safetensors')
    (folder/'00_data').mkdir()
    split_validation(phantom_index).to_csv(folder/'00_data'/'index.csv', index=False)
    write_json(folder/'run.json', dict(parameters={'00_data': dict(data=str(phantom_images), phantoms=480, seed=0, image_size=32, aspect='stretch')}))
    return folder

def test_a_run_knows_its_images(run, phantom_images, phantom_index, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*')}
    data = P.training_data(run)
    assert data.index.path.tolist() == phantom_index.path.tolist() and data.source.images == phantom_images and set(data.index.split) > {'train', 'validation'}
    np.testing.assert_array_equal(data.pixels, pixel_cache(phantom_images, phantom_index, 32, folder=tmp_path/'cache'))
    assert {p: p.stat().st_mtime_ns for p in run.rglob('*')} == before, 'nothing in the run is touched'

def test_a_model_of_ones_own_learns_to_warn(run, phantom_images):
    "Of a negative film and of noise, and hardly of the images that it was tested with; only after it has learnt."
    film = next((phantom_images/'test').rglob('*.jpeg'))
    strange = [255 - np.asarray(Image.open(film).convert('L')), np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)]
    assert P.Predictor.load(run).unusual is None
    data = P.training_data(run)
    file = P.learn_usual(run, Dataset(data.index, data.pixels, Source('phantom', phantom_images)))
    assert file == run/'04_augment'/'seed_0'/'model.usual.safetensors'
    knowing = P.Predictor.load(run)
    assert all(knowing.predict(strange).warning)
    assert (knowing.predict(phantom_images/'test').warning != '').mean() < .25

def test_where_nothing_usual_can_be_learnt(run, tmp_path):
    with pytest.raises(FileNotFoundError, match='model.safetensors is in no run'): P.learn_usual(saved(tmp_path/'alone'/'model.safetensors'))
    with pytest.raises(ValueError, match="a view 'lungs'"): P.learn_usual(saved(run/'08_masked'/'lungs'/'model.safetensors', recipe=dict(input='lungs')))
    with pytest.raises(FileNotFoundError, match="'alone' is no run"): P.training_data(tmp_path/'alone')
    shutil.rmtree(run/'00_data'); (run/'00_data').mkdir()
    with pytest.raises(FileNotFoundError, match='00_data has been executed'): P.learn_usual(run)
    assert not list(tmp_path.rglob('*.usual.*'))

# --- threads

@pytest.fixture
def two_threads():
    "PyTorch with two threads, whatever the tests are given."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

def test_threads_do_not_change_answers_or_settings(predictor, phantom_images, monkeypatch, two_threads):
    "One batch after another in one thread, or many at once: the same bits; and PyTorch and BLAS have as many threads afterwards as before, also in threads that are still to come."
    def settings():
        with ThreadPoolExecutor(1) as fresh: return torch.get_num_threads(), fresh.submit(torch.get_num_threads).result(), [b['num_threads'] for b in threadpool_info() if b['user_api'] == 'blas']
    before, answers, inside = settings(), predictor._answers, []
    def looked(*a):
        inside.append((torch.get_num_threads(), *(b['num_threads'] for b in threadpool_info() if b['user_api'] == 'blas')))
        return answers(*a)
    monkeypatch.setattr(predictor, '_answers', looked)
    one, many = (pd.concat([pd.DataFrame(b) for b in predictor._stream(P._sources(phantom_images/'test'), batch_size=3, heat=True, view=64, workers=w)]) for w in (1, 5))
    assert one.probability.tolist() == many.probability.tolist() and one.path.tolist() == many.path.tolist() and all((a == b).all() for a, b in zip(one.heat, many.heat))
    assert settings() == before and before[0] > 1 and {n for row in inside for n in row} == {1}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in predictor.network.modules())

@pytest.mark.parametrize('name', ['small', 'mobilenet_v3_small', 'vgg11_bn', 'resnet18'])
def test_folding_changes_no_answer(name):
    "With statistics far from 0 and 1, as after training."
    torch.manual_seed(0)
    net = build_model(name).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2); m.weight.data.uniform_(.5, 2); m.bias.data.normal_()
    x, before = torch.rand(3, 1, 64, 64), deepcopy(net.state_dict())
    folded = P._folded(net)
    with torch.no_grad(): torch.testing.assert_close(folded(x), net(x), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), 'the network itself is left as it was'
    kinds = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules()) for n in (net, folded)]
    assert kinds[0] > kinds[1]
    assert [n for n, _ in net.named_modules() if n != 'scale'] == [n for n, _ in folded.named_modules() if n != 'scale'], 'layers are found by their names'

# --- the table

NAMES = ['plain.png', '=cmd|\'/c calc\'!A1', '+1', '-2', '@SUM(A1)', '\tx', '\rx', '\n=x', "'=x", "''", 'a,b;"c"', 'two\nlines', 'mac\rline', os.fsdecode(b'caf\xe9\xff'), r'C:\udce9\u005c', '\\', r'\u005cudce9', '＝1', '日本.png', '']

def test_cells_can_be_undone():
    rng = np.random.default_rng(0)
    letters = list("=+-@'\\ud0ce95\t\r\n\",;aé\udce9\udcff\ud800")
    for text in NAMES + [''.join(rng.choice(letters, rng.integers(0, 12))) for _ in range(3000)]:
        cell = P.to_cell(text)
        assert P.from_cell(cell) == text and not cell.startswith(('=', '+', '-', '@', '\t', '\r', '\n', '＝')), repr(text)
        cell.encode('utf-8')

def test_the_table_is_readable_by_others(tmp_path):
    rows = [[name, 'NORMAL', '0.25', '0.5', '', '', '', '', ''] for name in NAMES]
    table = P._Table(tmp_path/'t.csv', [])
    table.append(rows); table.file.close()
    ours, theirs = P.read_table(tmp_path/'t.csv'), pd.read_csv(tmp_path/'t.csv', keep_default_na=False)
    assert ours.path.tolist() == NAMES and theirs.probability.tolist() == [.25] * len(NAMES) == ours.probability.tolist()
    assert theirs.path[0] == NAMES[0] and list(theirs) == list(P.COLUMNS)

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows forbids such names')
def test_hostile_names_from_end_to_end(tmp_path, predictor, films, monkeypatch):
    names = [n for n in NAMES if n and '/' not in n] + ['=calc().jpeg', '<b>&amp;.jpeg']
    folder = tmp_path/'in'
    folder.mkdir()
    for name in names: shutil.copy(films/'a'/'film 0.jpeg', folder/name)
    told = P.predict_files(predictor, [folder/n for n in names], tmp_path/'out', batch_size=5)
    table = P.read_table(tmp_path/'out'/'predictions.csv')
    assert table.path.tolist() == [str(folder/n) for n in names] and table.heatmap.nunique() == len(names) == told['counts']['read']
    for h in table.heatmap: Image.open(tmp_path/'out'/h).verify()
    monkeypatch.chdir(folder)
    relative = [n for n in names if n[0] != '\n']
    P.predict_files(predictor, relative, tmp_path/'relative', heatmaps=False)
    with open(tmp_path/'relative'/'predictions.csv', newline='', encoding='utf-8') as f:
        assert not any(cell.startswith(('=', '+', '-', '@', '\t', '\r')) for row in csv.reader(f) for cell in row)
    assert P.read_table(tmp_path/'relative'/'predictions.csv').path.tolist() == relative

def test_heatmap_names():
    paths = ['a/x.jpeg', 'b/x.jpeg', 'a/x.png', 'a/X.jpeg', 'x' * 300, '../../etc/passwd', '.png', os.fsdecode(b'\xff'), '<i>.png', 'CON']
    names = [P.heatmap_name(p) for p in paths]
    assert len({n.lower() for n in names}) == len(paths) and names == [P.heatmap_name(p) for p in paths]
    assert all(len(n) < 70 and n.endswith('.png') and n[0] not in '.-' and all(c.isascii() and (c.isalnum() or c in '._-') for c in n) for n in names), names

# --- runs that end early

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.lock' and p.name != 'provenance.json'}

@pytest.fixture(scope='module')
def whole(tmp_path_factory, predictor, films):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp('whole')
    told = P.predict_files(predictor, films, out, batch_size=4)
    assert told['complete'] and told['counts'] == dict(files=13, read=11, unreadable=2, warned=0, NORMAL=told['counts']['NORMAL'], PNEUMONIA=11 - told['counts']['NORMAL'])
    return out

def test_files_of_a_run(whole, predictor, films):
    table = P.read_table(whole/'predictions.csv')
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
        assert len(P.read_table(out/'predictions.csv')) <= 13
        told = P.predict_files(predictor, films, out, batch_size=4, resume=True)
        assert contents(out) == expected, cut
        assert told['complete'] and told['counts'] == read_json(whole/'provenance.json')['counts'] and told['created'] == read_json(whole/'provenance.json')['created']

def test_ctrl_c_leaves_whole_rows_that_resume_completes(tmp_path, whole, predictor, films, monkeypatch):
    answers, fifth = predictor._answers, P.read_table(whole/'predictions.csv').path[4]
    def interrupted(reads, *a):
        if reads[0].path == fifth: raise KeyboardInterrupt
        return answers(reads, *a)
    monkeypatch.setattr(predictor, '_answers', interrupted)
    with pytest.raises(KeyboardInterrupt, match='stopped after 4 files'): P.predict_files(predictor, films, tmp_path, batch_size=4)
    monkeypatch.undo()
    table, told = P.read_table(tmp_path/'predictions.csv'), read_json(tmp_path/'provenance.json')
    assert len(table) == 4 == told['counts']['files'] and not told['complete'] and (tmp_path/'predictions.csv').read_bytes().endswith(b'\n')
    assert contents(whole)['predictions.csv'].startswith((tmp_path/'predictions.csv').read_bytes())
    P.predict_files(predictor, films, tmp_path, batch_size=4, resume=True)
    assert contents(tmp_path) == contents(whole)

def test_a_full_disk_leaves_whole_rows(tmp_path):
    table = P._Table(tmp_path/'t.csv', [])
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
    P.predict_files(predictor, folder, out, batch_size=4)
    before = (out/'predictions.csv').read_bytes()
    assert P.predict_files(predictor, folder, out, batch_size=4, resume=True)['counts']['files'] == 7 and (out/'predictions.csv').read_bytes() == before
    shutil.copy(films/'b'/'film 0.jpeg', folder/'0 new.jpeg')
    P.predict_files(predictor, folder, out, resume=True)
    assert (out/'predictions.csv').read_bytes().startswith(before) and P.read_table(out/'predictions.csv').path.tolist()[7:] == [str(folder/'0 new.jpeg')]

def test_named_twice_is_two_rows_also_after_resume(tmp_path, predictor, films):
    twice = [films/'a'/'film 0.jpeg'] * 5
    P.predict_files(predictor, twice, tmp_path, batch_size=2)
    rows = P._whole_rows(tmp_path/'predictions.csv')
    (tmp_path/'predictions.csv').write_bytes(b''.join(rows[:4]))
    write_json(tmp_path/'provenance.json', read_json(tmp_path/'provenance.json') | dict(complete=False))
    assert P.predict_files(predictor, twice, tmp_path, batch_size=2, resume=True)['counts']['files'] == 5 == len(P.read_table(tmp_path/'predictions.csv'))

def test_what_must_not_be_continued(tmp_path, model, predictor, films, whole):
    out = tmp_path/'out'
    shutil.copytree(whole, out)
    before, other = contents(out), network()
    other.head.bias.data += 1
    with pytest.raises(ValueError, match='holds results already'): P.predict_files(predictor, films, out)
    for match, p, options in [('threshold', P.Predictor.load(model, threshold=.9), {}), ('heatmaps', predictor, dict(heatmaps=False)), ('model', P.Predictor.load(saved(tmp_path/'m.safetensors', other)), {})]:
        with pytest.raises(ValueError, match=f'other settings: {match}'): P.predict_files(p, films, out, resume=True, **options)
    with FileLock(out/'.predict.lock'), pytest.raises(RuntimeError, match='another process'): P.predict_files(predictor, films, out, resume=True)
    (out/'predictions.csv').write_text('path,score\nx,1\n')
    with pytest.raises(ValueError, match='no table of this program'): P.predict_files(predictor, films, out, resume=True)
    (out/'provenance.json').unlink()
    with pytest.raises(ValueError, match='no provenance.json'): P.predict_files(predictor, films, out, resume=True)
    assert (out/'predictions.csv').read_text() == 'path,score\nx,1\n' and all((out/n).read_bytes() == c for n, c in before.items() if n != 'predictions.csv')
    (tmp_path/'nothing').mkdir()
    with pytest.raises(FileNotFoundError, match='no image'): P.predict_files(predictor, tmp_path/'nothing', tmp_path/'never')
    assert not (tmp_path/'never').exists()

@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_killed_at_any_moment(tmp_path, model, phantom_images, predictor):
    "A real process, killed three times without notice, ends with the same bytes."
    folder = phantom_images/'test'
    P.predict_files(predictor, folder, tmp_path/'whole', batch_size=4)
    code = (f'import time; from cxr_lab.predict import *; p = Predictor.load({str(model)!r}, device="cpu"); a = p._answers\n'
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

# --- ONNX

@pytest.mark.parametrize('name, size', [('small', 48), pytest.param('resnet18', 64, marks=pytest.mark.slow)])
def test_onnx_agrees_with_pytorch(tmp_path, name, size):
    ort = pytest.importorskip('onnxruntime')
    torch.manual_seed(3)
    net = build_model(name).eval()
    file = saved(tmp_path/'m.safetensors', net, model=name, image_size=size)
    told = P.export_onnx(file, tmp_path/'m.onnx')
    session = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    for n in (1, 3):
        x = torch.rand(n, 1, size, size)
        with torch.no_grad(): expected = net(x)
        logits, p = session.run(None, {'pixels': x.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(p, expected.softmax(1)[:, 1], atol=1e-4)
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props['image_size']) == size and json.loads(props['classes']) == list(CLASSES) and json.loads(props['threshold']) == .45 and props['caveat'] == P.CAVEAT == told['caveat']
    assert [p.name for p in tmp_path.iterdir() if '.onnx' in p.name] == ['m.onnx']
    assert isinstance(load_model(file)[0].scale, torch.nn.Module)

def test_onnx_without_its_packages(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(RuntimeError, match=r"pip install 'cxr_lab\[onnx\]'"): P.export_onnx(model, tmp_path/'m.onnx')
    assert not (tmp_path/'m.onnx').exists()
