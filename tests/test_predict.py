"Predictions on files of one's own: the same as the lessons', one row for every file, and nothing lost or half written when a run ends early."
import io, json, os, shutil, time
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
from cxr_lab.answers import predict_files, read_table
from cxr_lab.data import Dataset, split_validation
from cxr_lab.films import Refused, square
from cxr_lab.maps import explain as gradcam_explain
from cxr_lab.images import Source, pixel_cache
from cxr_lab.masked import look_at_all
from cxr_lab.model import build_model, load_model, overfit_one_batch
from cxr_lab.networks import predict as predict_batches, save_model
from cxr_lab.runs import CLASSES, read_json, read_predictions, write_json
from predictors import INFO, films, model, network, predictor, saved

# --- the same as the lessons

def test_same_as_the_pixel_cache_and_lesson_03(tmp_path, phantom_images, phantom_index, predictor):
    index = phantom_index.iloc[::7]
    pixels = pixel_cache(phantom_images, index, 32, folder=tmp_path)
    table = predictor.predict([phantom_images/p for p in index.path], batch_size=5)
    assert np.ptp(table.probability) > .2, 'answers that do not differ prove nothing'
    np.testing.assert_allclose(table.probability, predict_batches(predictor.network, pixels), atol=1e-6)
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
    expected = predict_batches(predictor.network, pixel_cache(root, index, 32, aspect, folder=tmp_path/'cache'))
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
    told = predict_files(predictor, [tmp_path/'a.dcm', tmp_path/'b.png', a], tmp_path/'out')
    table = read_table(tmp_path/'out'/'predictions.csv')
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
    assert predict_files(predictor, films, tmp_path)['settings']['lungs'] == 'lungs'

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
    for answers in predictor.stream(P.images_in(images), batch_size=4, workers=2):
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
    one, many = (pd.concat([pd.DataFrame(b) for b in predictor.stream(P.images_in(phantom_images/'test'), batch_size=3, heat=True, view=64, workers=w)]) for w in (1, 5))
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
