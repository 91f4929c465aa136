"Synthetic radiographs: physics against closed forms, masks against the image, the data set against its contract."
import csv, hashlib, math, re, shutil, time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cxr_lab import phantom
from cxr_lab.phantom import (Ellipsoid, Stack, Tubes, View, attenuation, covered, expose, length, make_phantom, mosaic, optical_depth,
                             profile, sample_patient, splat, trace, write_marked, write_phantoms)
from cxr_lab.runs import read_json

KERMANY = re.compile(r'(person\d+_(?:bacteria|virus))|((?:NORMAL2-)?IM-\d+)')
SMALL = dict(n_train=16, n_val=4, n_test=8, size=48, seed=7)
PHI = {'train': 1., 'val': -1., 'test': 0.}
SEEDS = range(500, 516)

@pytest.fixture(scope='module')
def phantoms(): return [make_phantom(s, s % 2, size=112) for s in SEEDS]

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp('data')/'phantoms', **SMALL, marker_correlation=PHI)

def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob('*')) if p.is_file()}

def read(path, mode):
    with Image.open(path) as image: assert image.mode == mode, path; return np.asarray(image)

def rows(root):
    with open(root/'phantoms.csv', newline='') as f: return list(csv.DictReader(f))

# physics

@pytest.mark.parametrize('tilt,yaw,roll', [(0, 0, 0), (35, 0, 0), (35, 20, -10)])
def test_ellipsoid_chord_is_the_one_found_by_sampling_depth(tilt, yaw, roll):
    view = View(size=40, fov=120, yaw=yaw, roll=roll, centre=(3, -2), squeeze=1.1)
    (cx, cy, cz), (rx, ry, rz) = centre, radii = (6., 10., -4.), (40., 20., 28.)
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    depth = np.linspace(-60, 60, 4001)[:, None, None]
    dx = view.x - (cx*math.cos(math.radians(yaw)) - cy*math.sin(math.radians(yaw))); dz = view.z - cz
    inside = ((c*dx + s*dz) / rx)**2 + ((c*dz - s*dx) / rz)**2 + ((depth - cy) / ry)**2 <= 1
    assert np.abs(length(Ellipsoid(centre, radii, tilt).span(view)) - inside.sum(0)*120/4000).max() < .1

def test_sphere_chord_is_exact_through_its_middle_and_zero_outside():
    view = View(size=101, fov=101, centre=(0, 0))
    chord = length(Ellipsoid((0, 0, 0), (30, 30, 30)).span(view))
    assert chord[50, 50] == pytest.approx(60, abs=1e-4) and chord[50, 68] == pytest.approx(2*math.sqrt(30**2 - 18**2), abs=1e-3)
    assert (chord[:, :20] == 0).all() and chord.dtype == np.float32

def test_stack_of_constant_ellipses_is_a_cylinder():
    view = View(size=64, fov=128, centre=(0, 0))
    chord = length(Stack(5., -3., 40., 20.).span(view))
    assert np.abs(chord - 40*np.sqrt(np.maximum(1 - ((view.x - 5) / 40)**2, 0))).max() < 1e-3

def test_covered_counts_common_parts_once():
    rng = np.random.default_rng(0); grid = np.linspace(0, 1, 20001)[:, None]
    spans = [tuple(np.sort(rng.uniform(0, 1, (2, 200)), axis=0)) for _ in range(5)]
    span, others = spans[0], spans[1:]
    both = lambda s: (grid >= s[0]) & (grid <= s[1])
    truth = (both(span) & np.any([both(o) for o in others], axis=0)).mean(0)
    assert np.abs(covered(span, others) - truth).max() < 1e-3

def test_splat_keeps_the_volume_and_a_tube_shows_its_depth():
    view, one = View(size=100, fov=100, centre=(0, 0)), np.ones((1, 80), np.float32)
    rod = np.stack([np.linspace(-30, 30, 80), 0*one[0], 0*one[0]], -1)[None].astype(np.float32)
    points, wall, core = Tubes(rod, 6*one, 4*one, cortex=1.).pieces(.25)
    shell, spongy = splat(view, points, wall, core)
    assert (shell.sum() + spongy.sum())*view.pixel**2 == pytest.approx(math.pi*6*4*60, rel=.02)
    assert spongy.sum()*view.pixel**2 == pytest.approx(math.pi*5*3*60, rel=.02)
    assert (shell + spongy)[49:51, 50].mean() == pytest.approx(8, rel=.03)  # twice the half depth
    rim, middle = shell[[44, 55], 30:70].mean(), shell[49:51, 30:70].mean()
    assert rim > 1.2*middle, 'a bone is brightest at its edges'

def test_pose_moves_the_pieces_and_the_solids_together():
    view = View(size=100, fov=80, roll=25, yaw=15, centre=(4, -3), squeeze=1.1)
    rng, n = np.random.default_rng(0), 200_000
    points = rng.normal(size=(n, 3)); points *= 15*rng.uniform(size=(n, 1))**(1/3) / np.linalg.norm(points, axis=1, keepdims=True)
    dust = splat(view, (points + [10, 20, 5]).astype(np.float32), np.full(n, 4/3*math.pi*15**3 / n, np.float32))[0]
    solid = length(Ellipsoid((10, 20, 5), (15, 15, 15)).span(view))
    assert np.corrcoef(solid.ravel(), dust.ravel())[0, 1] > .98 and dust.sum() == pytest.approx(solid.sum(), rel=.02)

@pytest.mark.parametrize('tissue', ['fat', 'soft', 'lung', 'cortical'])
@pytest.mark.parametrize('mm', [5, 60, 180])
def test_slab_obeys_beer_lambert(tissue, mm):
    mu = attenuation(60)
    assert mu[tissue] == pytest.approx(phantom._MASS_ATTENUATION[tissue][1]*phantom._DENSITY[tissue] / 10)
    zero = np.zeros((32, 32), np.float32); slab = zero + mm
    paths = dict(body=slab, fat=zero, lung=zero, cortical=zero, spongy=zero, air=zero, vessel=zero)
    if tissue != 'soft': paths[tissue] = slab
    assert np.allclose(expose(optical_depth(paths, mu), 1.), math.exp(-mu[tissue]*mm), rtol=1e-4)

def test_scatter_adds_a_veil_and_noise_is_poisson():
    tau = np.full((200, 200), 2., np.float32)
    clean, veiled = expose(tau, 1.), expose(tau, 1., scatter=.5)
    assert np.allclose(veiled, clean + .5*clean*(1 - clean), rtol=1e-3)
    counts = expose(tau, .5, np.random.default_rng(0), photons=4000)*1000   # 4000 per mm^2 are 1000 per pixel of 0.5 mm
    assert counts.mean() == pytest.approx(1000*math.exp(-2), rel=.01) and counts.var() == pytest.approx(counts.mean(), rel=.03)

def test_tissues_fit_into_the_body():
    for seed in range(4):
        patient = sample_patient(np.random.default_rng(seed)); paths = trace(patient, View(size=96))
        assert all(bone.cortex > 0 for bone in patient.bones)
        assert all(p.dtype == np.float32 and p.shape == (96, 96) and p.min() >= -1e-3 for p in paths.values())
        assert (paths['lung'] <= paths['body'] + 1e-3).all() and (paths['fat'] <= paths['body'] + 1e-3).all()

def test_resolution_changes_the_detail_and_not_the_picture():
    fine, coarse = make_phantom(3, 1, size=256), make_phantom(3, 1, size=128)
    halved = cv2.resize(fine.image, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(halved.ravel(), coarse.image.ravel())[0, 1] > .98
    assert (fine.lung_mask[::2, ::2] == coarse.lung_mask).mean() > .97

# phantoms

def test_same_arguments_same_bytes():
    a, b = make_phantom(42, 1, size=96, marker=True), make_phantom(42, 1, size=96, marker=True)
    for name in ('image', 'lung_mask', 'opacity_mask', 'marker_mask'): assert np.array_equal(getattr(a, name), getattr(b, name))
    assert (a.patient, a.subtype, a.label) == (b.patient, b.subtype, 1)
    for other in (dict(seed=43), dict(shot=1), dict(shift=1.)):
        assert not np.array_equal(make_phantom(**{**dict(seed=42, label=1, size=96, marker=True), **other}).image, a.image)

def test_types_and_labels(phantoms):
    for p, s in zip(phantoms, SEEDS):
        assert p.image.dtype == np.uint8 and p.image.shape == (112, 112) and p.patient == s and p.label == s % 2
        assert all(m.dtype == bool and m.shape == (112, 112) for m in (p.lung_mask, p.opacity_mask, p.marker_mask))
        assert p.subtype in (phantom.SUBTYPES if p.label else ('',))
    assert {p.subtype for p in phantoms} == {'', 'bacteria', 'virus'}

def test_masks_are_plausible(phantoms):
    for p in phantoms:
        assert .12 < p.lung_mask.mean() < .55
        assert not (p.opacity_mask & ~p.lung_mask).any()
        assert p.opacity_mask.any() == bool(p.label)
        n, _, stats, _ = cv2.connectedComponentsWithStats(p.lung_mask.astype(np.uint8))
        assert np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1][:2].sum() > .97*p.lung_mask.sum(), 'a lung mask is two lungs'

def test_lungs_are_dark_where_the_mask_says(phantoms):
    for p in phantoms:
        ring = cv2.dilate(p.lung_mask.astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool) & ~p.lung_mask & (p.image > 8)  # body
        clear = p.lung_mask & ~p.opacity_mask
        assert p.image[clear].mean() < p.image[ring].mean() - 15

def test_opacity_is_where_the_ill_image_differs_from_the_healthy_one():
    for seed in range(600, 608):
        ill, well = (make_phantom(seed, label, size=112) for label in (1, 0))
        assert np.array_equal(ill.lung_mask, well.lung_mask)
        brighter = cv2.GaussianBlur(ill.image.astype(np.float32) - well.image, (0, 0), 1.5)
        outside = (well.image > 8) & ~cv2.dilate(ill.lung_mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        assert brighter[ill.opacity_mask].mean() > brighter[ill.lung_mask & ~ill.opacity_mask].mean() + 4
        assert brighter[ill.opacity_mask].mean() > np.abs(brighter[outside]).mean() + 5

def test_marker_touches_its_own_pixels_and_nothing_else():
    for seed in range(4):
        with_, without = (make_phantom(seed, seed % 2, size=160, marker=m) for m in (True, False))
        assert np.array_equal(with_.image[~with_.marker_mask], without.image[~with_.marker_mask])
        assert not without.marker_mask.any() and 10 < with_.marker_mask.sum() < 600
        assert with_.image[with_.marker_mask].max() > 220
        y, x = np.nonzero(with_.marker_mask); assert x.max() < 80 and y.max() < 80, 'upper left corner'

def test_shift_flattens_and_brightens():
    def contrast(p): lung = p.image[p.lung_mask].mean(); return lung, p.image[60:, 40:56].mean() - lung   # against the mediastinum
    train, test = (np.mean([contrast(make_phantom(s, 0, size=96, shift=shift)) for s in range(6)], axis=0) for shift in (0., 1.))
    assert test[0] > train[0] + 8 and test[1] < train[1] - 4

def test_opacities_come_in_all_strengths():
    rng = np.random.default_rng(0); patient = sample_patient(rng)
    for subtype in phantom.SUBTYPES:
        strengths = [phantom.sample_disease(rng, patient, subtype).strength for _ in range(100)]
        assert max(strengths) / min(strengths) > 2 and 0 < min(strengths) and max(strengths) <= 1

def test_mosaic_fills_up_the_last_row():
    sheet = mosaic([np.full((4, 4), i + 1) for i in range(5)], columns=3)
    assert sheet.shape == (8, 12) and sheet[0, 0] == 1 and sheet[4, 4] == 5 and (sheet[4:, 8:] == 0).all()

# the data set

def test_layout_names_and_counts(written):
    found = {p.relative_to(written/'chest_xray') for p in (written/'chest_xray').rglob('*.jpeg')}
    count = lambda split, name: sum(p.parts[:2] == (split, name) for p in found)
    counts = {s: [count(s, c) for c in ('NORMAL', 'PNEUMONIA')] for s in ('train', 'val', 'test')}
    assert counts == dict(train=[4, 12], val=[2, 2], test=[3, 5])
    for p in found:
        m = KERMANY.match(p.name); assert m, p
        assert bool(m.group(1)) == (p.parts[1] == 'PNEUMONIA')
    assert {p.name for p in written.iterdir()} == {'chest_xray', 'lung_masks', 'opacity_masks', 'phantom.json', 'phantoms.csv'}

def test_images_and_masks_can_be_read_and_pair_up(written):
    for p in (written/'chest_xray').rglob('*.jpeg'):
        relative = p.relative_to(written/'chest_xray').with_suffix('.png')
        lung, opacity = (read(written/d/relative, '1') for d in ('lung_masks', 'opacity_masks'))
        assert read(p, 'L').shape == lung.shape == opacity.shape == (48, 48)
        assert .1 < lung.mean() < .6 and not (opacity & ~lung).any() and opacity.any() == (p.parent.name == 'PNEUMONIA')
    assert sum(1 for _ in written.rglob('*.png')) == 2*28

def test_no_patient_is_in_two_splits_and_some_have_several_images():
    items = phantom._plan(dict(train=480, val=16, test=200), 0); where = {}
    for i in items: where.setdefault(KERMANY.match(i.stem).group(0), []).append(i)
    assert all(len({(i.split, i.patient, i.label) for i in g}) == 1 for g in where.values())
    assert len(where) == len({i.patient for i in items}) and len({i.seed for i in items}) == len(where)
    assert sum(len(g) > 1 for g in where.values()) > 50

def test_a_row_of_the_table_makes_its_image_again(written):
    for row in rows(written)[::5]:
        p = make_phantom(int(row['seed']), int(row['label']), size=48, marker=row['marker'] == '1', shot=int(row['shot']),
                         shift=float(row['split'] == 'test'))
        stored = cv2.imread(str(written/'chest_xray'/row['path']), cv2.IMREAD_GRAYSCALE)
        assert np.abs(stored - p.image.astype(float)).mean() < 4   # JPEG
        assert p.subtype == row['subtype'] and p.opacity_mask.sum() == int(row['opacity_pixels'])
        assert np.array_equal(read((written/'lung_masks'/row['path']).with_suffix('.png'), '1'), p.lung_mask)

@pytest.mark.parametrize('phi', [-1., -.7, 0., .35, .9, 1.])
@pytest.mark.parametrize('ill', [8, 360])
def test_marker_correlation_is_what_was_asked(phi, ill):
    labels = np.arange(16 if ill == 8 else 480) < ill
    marked = phantom._markers(labels, phi, np.random.default_rng(1)); n = len(labels)
    assert abs(np.corrcoef(labels, marked)[0, 1] - phi) <= .5*n / (ill*(n - ill)) + 1e-9   # half an image

def test_marker_correlation_per_split_reaches_the_files(written):
    for split, phi in PHI.items():
        own = [r for r in rows(written) if r['split'] == split]
        label, marker = (np.array([int(r[k]) for r in own]) for k in ('label', 'marker'))
        assert abs(np.corrcoef(label, marker)[0, 1] - phi) < .3 / len(own)**.5 + (.1 if phi == 0 else 0)

def test_no_markers_unless_asked(tmp_path):
    assert all(r['marker'] == '0' for r in rows(write_phantoms(tmp_path/'p', n_train=4, n_val=2, n_test=2, size=32)))

def test_processes_do_not_change_a_byte(written, tmp_path):
    assert digests(write_phantoms(tmp_path/'two', **SMALL, marker_correlation=PHI, workers=2)) == digests(written)
    other = {**SMALL, 'seed': 8}
    assert digests(write_phantoms(tmp_path/'other', **other, marker_correlation=PHI)) != digests(written)

@pytest.mark.parametrize('few,asked,expected', [(28, None, None), (29, None, 1), (29, 2, 2)])
def test_small_sets_start_no_processes(tmp_path, monkeypatch, few, asked, expected):
    "28 images: enough for processes, or too few unless they are asked for."
    seen = []
    def alone(function, items, desc, workers): seen.append(workers); return [function(i) for i in items]
    monkeypatch.setattr(phantom, '_FEW', few)
    monkeypatch.setattr(phantom, 'in_processes', alone)
    write_phantoms(tmp_path/'p', **SMALL, workers=asked)
    assert seen == [expected]

def test_sets_that_differ_in_their_markers_are_rendered_once(written, tmp_path, monkeypatch):
    calls, trace_, code = [], phantom.trace, phantom.generator()
    monkeypatch.setattr(phantom, 'generator', lambda: code)  # what counts is no other generator
    monkeypatch.setattr(phantom, 'trace', lambda *a: (calls.append(1), trace_(*a))[1])
    roots = {tmp_path/'a': PHI, tmp_path/'b': None, tmp_path/'c': -.5}
    assert write_marked(roots, **SMALL) is None and len(calls) == 28
    assert digests(tmp_path/'a') == digests(written), 'as if it were alone'
    for name, phi in (('b', None), ('c', -.5)):
        assert digests(tmp_path/name) == digests(write_phantoms(tmp_path/f'{name}2', **SMALL, marker_correlation=phi))
    calls.clear()
    shutil.rmtree(tmp_path/'c')
    write_marked(roots, **SMALL)
    assert len(calls) == 28 and digests(tmp_path/'c') == digests(tmp_path/'c2'), 'only what is missing'
    calls.clear()
    write_marked(roots, **SMALL)
    assert not calls

def test_one_of_several_sets_that_cannot_be_written_stops_all(tmp_path):
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'mine.txt').touch()
    with pytest.raises(FileExistsError, match='not written by write_phantoms'):
        write_marked({tmp_path/'a': 1., tmp_path/'b': 0.}, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['b']

def test_a_failure_in_another_process_leaves_nothing(tmp_path, monkeypatch):
    items = phantom._items
    def bad(parameters):
        found = items(parameters)
        found[len(found) // 2].seed = -1
        return found
    monkeypatch.setattr(phantom, '_items', bad)
    with pytest.raises(ValueError, match='seed is -1'): write_phantoms(tmp_path/'p', **SMALL, workers=2)
    time.sleep(1)  # for whoever is still at work
    assert list(tmp_path.iterdir()) == []

def test_a_folder_that_other_code_wrote_is_not_reused(written, monkeypatch):
    code = phantom.generator()
    original = phantom.trace
    def brighter(*args): return original(*args) + 1
    monkeypatch.setattr(phantom, 'trace', brighter)
    assert phantom.generator() != code
    with pytest.raises(FileExistsError, match='other phantoms .generator is'): write_phantoms(written, **SMALL, marker_correlation=PHI)

def test_a_complete_folder_is_reused(written, monkeypatch):
    code = phantom.generator()
    monkeypatch.setattr(phantom, 'generator', lambda: code)
    before = {p: p.stat().st_mtime_ns for p in written.rglob('*')}
    monkeypatch.setattr(phantom, '_write_patient', lambda *a: pytest.fail('wrote again'))
    assert write_phantoms(str(written), **SMALL, marker_correlation=PHI) == written
    assert {p: p.stat().st_mtime_ns for p in written.rglob('*')} == before

@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt(), RuntimeError('boom')])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, error):
    save, calls = phantom._save, []
    def failing(*args):
        calls.append(1)
        if len(calls) == 20: raise error
        save(*args)
    monkeypatch.setattr(phantom, '_save', failing)
    with pytest.raises(type(error)): write_phantoms(tmp_path/'p', **SMALL)
    assert len(calls) >= 20 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(phantom, '_save', save)
    assert write_phantoms(tmp_path/'p', **SMALL).is_dir()

def test_an_empty_folder_is_filled_and_a_foreign_or_damaged_one_refused(tmp_path):
    few = dict(n_train=4, n_val=2, n_test=2, size=32)
    (tmp_path/'p').mkdir(); root = write_phantoms(tmp_path/'p', **few); before = digests(root)
    with pytest.raises(FileExistsError, match='holds other phantoms.*seed is 0, wanted 1'): write_phantoms(root, **few, seed=1)
    assert digests(root) == before
    next((root/'lung_masks').rglob('*.png')).unlink()
    with pytest.raises(FileExistsError, match='1 files are missing.*lung_masks/'): write_phantoms(root, **few)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='not written by write_phantoms'): write_phantoms(tmp_path/'mine', **few)
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'years of work'
    (tmp_path/'file').write_text('x')
    with pytest.raises(FileExistsError, match='is a file'): write_phantoms(tmp_path/'file', **few)

@pytest.mark.parametrize('bad,match', [
    (dict(n_train=1), 'n_train is 1, expected a whole number of images .* from 2'), (dict(n_val=0), 'n_val is 0'),
    (dict(n_test=2.5), 'n_test is 2.5'), (dict(seed=-1), 'seed is -1, expected a whole number from 0'),
    (dict(size=16), 'size is 16, expected a whole number of pixels from 32 to 4096'),
    (dict(test_shift=-.1), 'test_shift is -0.1, expected'), (dict(test_shift=math.nan), 'test_shift is nan'),
    (dict(test_shift=math.inf), 'test_shift is inf'),
    (dict(film_clue=1.5), 'film_clue is 1.5, expected a number from 0 to 1'), (dict(subtlety=-.1), 'subtlety is -0.1, expected'),
    (dict(workers=0), 'workers is 0, expected None or a whole number from 1'),
    (dict(marker_correlation=1.5), 'marker_correlation is .*, expected None, a number from -1 to 1'),
    (dict(marker_correlation={'train': 1.}), 'one for each of'), (dict(marker_correlation='all'), 'marker_correlation')])
def test_bad_parameters_of_a_data_set(tmp_path, bad, match):
    with pytest.raises(ValueError, match=match): write_phantoms(tmp_path/'p', **bad)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('bad,match', [
    (dict(label=2), 'label is 2, expected 0'), (dict(seed=-3), 'seed is -3, expected'), (dict(seed=.5), 'seed is 0.5'),
    (dict(size=8), 'size is 8, expected'), (dict(size=64.), 'size is 64.0'),
    (dict(subtype='fungus'), "subtype is 'fungus'.*expected None, or one of"),
    (dict(label=0, subtype='virus'), 'for label 0'), (dict(shift=-1), 'shift is -1, expected'), (dict(shift=math.nan), 'shift is nan'),
    (dict(film=.2), 'film is 0.2, expected a number from 0.5 to 2'), (dict(film=math.nan), 'film is nan'),
    (dict(subtlety=2), 'subtlety is 2, expected a number from 0 to 1'), (dict(shot=-1), 'shot is -1, expected')])
def test_bad_parameters_of_a_phantom(bad, match):
    with pytest.raises(ValueError, match=match): make_phantom(**{**dict(seed=0, label=1), **bad})

@pytest.mark.parametrize('kev', [39, 81, math.nan])
def test_energies_outside_of_the_table(kev):
    with pytest.raises(ValueError, match='expected an effective energy from 40 to 80'): attenuation(kev)

def test_knots_must_rise():
    with pytest.raises(ValueError, match='must rise'): profile((0, 1), (5, 2), (5, 3))

# the films' formats

def box(mask):
    "Width and height of what a mask covers, pixels."
    across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([np.ptp(across) + 1, np.ptp(down) + 1])

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp('study')/'phantoms'
    return write_phantoms(root, n_train=300, n_val=4, n_test=200, size=48, **phantom.STUDY)

def told_by_proportion(root, split):
    "AUROC of height / width of the lungs' box, which is ground truth, for PNEUMONIA."
    from sklearn.metrics import roc_auc_score
    own = [r for r in rows(root) if r['split'] == split]
    boxes = np.array([box(read((root/'lung_masks'/r['path']).with_suffix('.png'), '1')) for r in own])
    return roc_auc_score([int(r['label']) for r in own], boxes[:, 1] / boxes[:, 0])

def test_proportion_tells_the_class_in_train_and_hardly_in_test(study):
    assert .85 < told_by_proportion(study, 'train') < .95
    assert .55 < told_by_proportion(study, 'test') < .72

def test_without_the_clue_proportion_tells_little_anywhere(tmp_path):
    root = write_phantoms(tmp_path/'p', n_train=200, n_val=4, n_test=4, size=48)
    assert {r['film'] for r in rows(root)} == {'1.0'}, 'off unless asked for'
    assert .4 < told_by_proportion(root, 'train') < .6

@pytest.mark.parametrize('film', [.8, 1.1, 1.25])
def test_a_film_is_squeezed_and_its_masks_with_it(film):
    "A film that is wider by f, of the same area, squared: everything is narrower by sqrt(f), higher by sqrt(f)."
    for seed in (3, 6):
        usual, other = (make_phantom(seed, 1, size=512, film=f) for f in (1., film))
        expected = box(usual.lung_mask[:, :]) * [film**-.5, film**.5]
        margins = [m.any(0)[[0, -1]].any() or m.any(1)[[0, -1]].any() for m in (usual.lung_mask, other.lung_mask)]
        if not any(margins): assert np.abs(box(other.lung_mask) - expected).max() <= 6, 'the pose turns it a little'
        assert not (other.opacity_mask & ~other.lung_mask).any()
        inside = other.image[other.lung_mask & ~other.opacity_mask].mean()
        around = cv2.dilate(other.lung_mask.astype(np.uint8), np.ones((41, 41))) > 0
        assert inside < other.image[around & ~other.lung_mask].mean(), 'lungs are dark where the mask says'

def test_the_squeeze_is_exact_where_nothing_is_turned():
    anatomy = sample_patient(np.random.default_rng(0))
    pose = dict(size=800, centre=(0., 70.))
    def lungs(view): return phantom.air(anatomy.lungs, anatomy.mediastinum, anatomy.domes, view) > phantom.LUNG_MM
    usual = box(lungs(View(fov=320., **pose)))
    for film in (.8, 1.25):
        squeezed = box(lungs(View(fov=320. / math.sqrt(film), squeeze=film, **pose)))
        assert squeezed == pytest.approx(usual * [film**-.5, film**.5], abs=2)

def test_the_table_knows_the_films_and_makes_them_again(study):
    for row in rows(study)[::100]:
        p = make_phantom(int(row['seed']), int(row['label']), size=48, shot=int(row['shot']), film=float(row['film']),
                         shift=phantom.STUDY['test_shift']*(row['split'] == 'test'), subtlety=phantom.STUDY['subtlety'])
        assert np.array_equal(read((study/'lung_masks'/row['path']).with_suffix('.png'), '1'), p.lung_mask)
        stored = cv2.imread(str(study/'chest_xray'/row['path']), cv2.IMREAD_GRAYSCALE)
        assert np.abs(stored - p.image.astype(float)).mean() < 4   # JPEG

def test_subtle_opacities_are_fainter_and_lie_where_they_lay():
    for subtype, seed in (('bacteria', 4), ('virus', 4)):
        well = make_phantom(seed, 0, size=96).image.astype(float)
        plain, subtle = (make_phantom(seed, 1, size=96, subtype=subtype, subtlety=s) for s in (0., .6))
        assert np.array_equal(plain.opacity_mask, subtle.opacity_mask) and np.array_equal(plain.lung_mask, subtle.lung_mask)
        rise = [(p.image - well)[plain.opacity_mask].mean() for p in (plain, subtle)]
        assert 2 < rise[1] < .7*rise[0]

def test_the_letters_of_lesson_06_come_without_the_clue(tmp_path, monkeypatch):
    from cxr_lab.maps import marked_phantoms
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path))
    for source in marked_phantoms((1., 0.), 40):
        made = read_json(source.images.parent/'phantom.json')
        assert made['film_clue'] == made['subtlety'] == 0 and {r['film'] for r in rows(source.images.parent)} == {'1.0'}
