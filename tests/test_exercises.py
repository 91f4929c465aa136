"Exercises that change code change numbers: each edit, applied as its solution says, trains anew."
import json, re, shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from test_edits import cli, copy_checkout, edit

from cxr_lab.kept import changed
from cxr_lab.runs import read_json, read_metrics, read_predictions

pytestmark = pytest.mark.slow

PARAMS = dict(phantoms=96, image_size=64, epochs=1, seeds=1, ablation=False, shown=1500,
              n_boot=50)

def options(*lessons):
    "As many of `PARAMS` as these lessons have, for the command line."
    of = {'00_data': ['phantoms', 'image_size'], '03_train': ['epochs', 'seeds'],
          '04_augment': ['ablation'], '07_segment': ['shown'], '08_masked': ['n_boot']}
    return [part for lesson in lessons for name in of[lesson]
            for part in ('-p', f'{lesson}.{name}={PARAMS[name]}')]

def run(folder, *args):
    "`cxr-lab run` in a copied checkout with a cache of its own; what it said."
    code, err = cli(folder, folder, 'run', *args, CXR_LAB_CACHE=str(folder/'cache'))
    assert code == 0, err
    return err

def stand_in_for_lesson_06(run):
    "The four samples that lesson 08 shows, without the minutes of Grad-CAM that choose them."
    test = read_predictions(run/'04_augment/predictions.csv').query("split == 'test'")
    four = pd.concat([test[test.label == label].head(2) for label in (0, 1)])
    (run/'06_gradcam').mkdir()
    table = four[['path', 'label', 'probability']].assign(cell=['TN', 'FP', 'FN', 'TP'])
    table.to_csv(run/'06_gradcam/samples.csv', index=False)

@pytest.fixture(scope='session')
def studied(once, repo):
    "A checkout in which the lessons have run on small phantoms; read only, copy before changing."
    def make(folder):
        copy_checkout(repo, folder)
        first = '00_data', '03_train', '04_augment', '07_segment'
        run(folder, *first, '01_explore', *options(*first))
        stand_in_for_lesson_06(folder/'runs/default')
        run(folder, '08_masked', *options('08_masked'))
    return once('studied', make)

@pytest.fixture
def checkout(studied, tmp_path): return Path(shutil.copytree(studied, tmp_path/'checkout'))

class Exercise(NamedTuple):
    "An exercise of a lesson, and what its solution says to do."
    lesson: str
    number: int
    edits: list        # (text in one cell, what to write instead)
    said: list         # how the solution says it
    code: list         # names of definitions that are others then
    anew: list         # folders of results in the lesson's folder that get other numbers
    same: list = []    # those that are trained again and come out as before

FLIP = ['flip = (g[:, 0] > 0) & (_between(n, 0, 1, x) < .5)',
        'x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)']
GEOMETRY = 'g = g * some(1)\n'
WEIGHTS = 'torch.tensor([.5 / (1 - share), .5 / share], dtype=torch.float32)'
MOVE = """x = move(x, g[:, 0] * _between(n, -12, 12, x),
                     (g * _between((n, 2), -.25, .25, x)).exp(),
                     g * _between((n, 2), -.08, .08, x))"""
EXPOSE = """x = expose(x, (p * _between(n, -.7, .7, x)).exp(), (p * _between(n, -.7, .5, x)).exp(),
                       p * _between(n, -.2, .2, x), p * _between(n, 0, .06, x))"""
IMPORTED = 'from cxr_lab.lungs import prepare'
PLAIN = ('return np.stack([cv2.resize(i, (size, size)) for i in pixels[:, 0]])[..., None]'
         ' / np.float32(255)')
BY_HAND = """assert np.abs(prepare(image[None, None], size)[0, ..., 0] - by_hand.clip(-.5, 1.5)).max() < .02, (
    'the same as by hand')
"""
EXPOSURE = "assert np.abs(x - x[1]).mean() < .05, 'the exposure should be gone'\n"
BLANK = """assert not prepare(np.full((1, 1, 64, 64), 200, np.uint8), 32).any(), (
    'a blank image has nothing to scale')"""
STRESS = ("assert stress['mean'].min() > .5, "
          "'a change that leaves the lungs visible must not lose them'")
WHOLE = ("assert np.array_equal(ways['lungs'] + ways['removed'], film), "
         "'lungs and the rest are the whole'\n")
BLACK = "assert (ways['removed'][mask] == 0).all(), 'nothing of the lungs is left'\n"

def for_all(text):
    "Draws for each image become one draw for the batch."
    return text.replace('_between(n, ', '_between(1, ').replace('((n, 2), ', '((1, 2), ')

def message(check):
    "What an assertion says when it fails: the last text in it."
    return re.findall(r"'([^']*)'", check)[-1]

EXERCISES = [
    Exercise('03_train', 1, [(WEIGHTS, 'torch.ones(2)')],
             ['`class_weights`', 'torch.ones(2)'], ['class_weights'], ['seed_0']),
    Exercise('04_augment', 2, [(GEOMETRY, GEOMETRY + ''.join(f'            {l}\n' for l in FLIP))],
             [GEOMETRY.strip(), *FLIP], ['Augment.forward'], ['seed_0']),
    Exercise('04_augment', 3, [(MOVE, for_all(MOVE)), (EXPOSE, for_all(EXPOSE))],
             ['_between(n, ', '_between(1, ', '_between((n, 2), ', '_between((1, 2), '],
             ['Augment.forward'], ['seed_0']),
    Exercise('07_segment', 1, [(IMPORTED, f'def prepare(pixels, size):\n    {PLAIN}'),
                               (BY_HAND, ''), (EXPOSURE, ''), (BLANK, ''), (STRESS, '')],
             [f'`{IMPORTED}`', *map(message, (BY_HAND, EXPOSURE, BLANK, STRESS))],
             ['prepare'], []),
    Exercise('08_masked', 2, [(', image, 0).astype', ', image, image[mask].mean()).astype'),
                              (WHOLE, ''), (BLACK, '')],
             ['`look`', '`image[mask].mean()`', *map(message, (WHOLE, BLACK))],
             ['look'], ['lungs/seed_0'], ['crop/seed_0', 'crop_plain/seed_0'])]

def sources(notebook): return [''.join(c['source']) for c in
                               json.loads(notebook.read_text(encoding='utf-8'))['cells']]

def solution(exercise, repo):
    "What its lesson asks, and all that is written and computed under its solution, in one line."
    lesson, number = exercise.lesson, exercise.number
    text, = (s for s in sources(repo/f'nbs/{lesson}.ipynb') if '## Exercises' in s)
    asked = re.split(r'(?m)^\d\. ', text.partition('## Exercises')[2])[number]
    assert f'(solutions.ipynb#{lesson[:2]}-{number})' in asked
    parts = '\n'.join(sources(repo/'nbs/solutions.ipynb')).split('<a id="')
    solved, = (s for s in parts if s.startswith(f'{lesson[:2]}-{number}"'))
    return ' '.join((asked + solved).split())

def result(folder):
    "What a training left: predictions and test metrics."
    return (folder/'predictions.csv').read_bytes(), read_metrics(folder/'metrics.json')

def networks(folder):
    "Bytes and time of every network in the runs and in the cache."
    files = [p for kind in ('*.safetensors', 'lungs.keras') for top in ('runs', 'cache')
             for p in (folder/top).rglob(kind)]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}

def lung_trainings(folder):
    "Recipes of the lung networks in the cache, the oldest first."
    return [read_json(p) for p in sorted((folder/'cache/unet').glob('*/recipe.json'),
                                         key=lambda p: p.stat().st_mtime_ns)]

@pytest.mark.parametrize('lesson', ['03_train', '04_augment', '07_segment', '08_masked'])
def test_a_lesson_that_nobody_edited_trains_nothing(lesson, checkout):
    before, status = networks(checkout), checkout/f'runs/default/{lesson}/status.json'
    executed = read_json(status)['id']
    run(checkout, lesson, *options(lesson))
    after = networks(checkout)
    copied = 'runs/default/07_segment/lungs.keras'  # from the cache, at each execution
    assert {p: n[0] for p, n in before.items()} == {p: n[0] for p, n in after.items()}
    assert [p for p in before if before[p] != after[p] and p != copied] == []
    assert read_json(status)['id'] != executed, 'although its cells were executed'

@pytest.mark.parametrize('e', EXERCISES, ids=lambda e: f'{e.lesson[:2]}.{e.number}')
def test_an_exercise_trains_anew_and_finds_other_numbers(e, checkout, repo):
    text = solution(e, repo)
    for part in (*e.said, f'`cxr-lab run {e.lesson} --resume`'):
        assert part in text, f'the solution does not say {part}'
    folder = checkout/'runs/default'/e.lesson
    places = [*e.anew, *e.same]
    recipes = {p: read_json(folder/p/'recipe.json') for p in places}
    results = {p: result(folder/p) for p in places}
    models, metrics = networks(checkout), read_metrics(folder/'metrics.json')

    for old, new in e.edits: edit(checkout/f'nbs/{e.lesson}.ipynb', old, new)
    said = run(checkout, e.lesson, '--resume')

    assert f'{e.lesson} was edited: cxr_lab.{e.lesson[3:]} follows it\n' in said
    assert f'{e.lesson} (1/1): again, its code changed: ' in said
    now = networks(checkout)
    for place in places:
        recipe = read_json(folder/place/'recipe.json')
        assert changed(recipes[place]['code'], recipe['code']) == e.code
        model = f'runs/default/{e.lesson}/{place}/model.safetensors'
        assert models[model][1] != now[model][1], f'{place} was kept'
    for place in e.anew:
        model = f'runs/default/{e.lesson}/{place}/model.safetensors'
        assert models[model][0] != now[model][0]
        for before, after in zip(results[place], result(folder/place)): assert before != after
    for place in e.same: assert result(folder/place) == results[place]
    others = changed(metrics, read_metrics(folder/'metrics.json'))
    if e.lesson == '07_segment':
        first, second = lung_trainings(checkout)
        assert changed(first['code'], second['code']) == e.code
        assert {'dice_mean', 'dice_stress_min', 'masks'} <= set(others)
        lungs = 'runs/default/07_segment/lungs.keras'
        assert models[lungs][0] != now[lungs][0]
    else: assert any(name.endswith('test_auroc_mean') for name in others), others
