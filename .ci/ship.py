"Puts the models of a completed run on real images into the package: python .ci/ship.py runs/study"
import hashlib, shutil, sys
from pathlib import Path

import pandas as pd

import cxr_lab
from cxr_lab.model import load_model
from cxr_lab.predict import learn_usual, training_data
from cxr_lab.runs import atomic_path, read_json, read_metrics, write_json
from cxr_lab.lungs import ATTRIBUTION

INTENDED = 'Education and research. Not a diagnostic device.'
LIMITS = ("Frontal chest radiographs of children aged one to five, all from one hospital (Guangzhou Women and Children's Medical Center); what it says about adults, other hospitals, "
          'other views or other diseases is not known. Scores at threshold 0.5 unless the name says otherwise; the test images are of the same hospital.')

def copy(source, target):
    with atomic_path(target) as temporary: shutil.copyfile(source, temporary)

run, weights = Path(sys.argv[1]), Path(cxr_lab.__file__).parent/'weights'
facts, seed = read_json(run/'run.json'), run/'04_augment'/'seed_0'
kind = facts['dataset']['kind']
if kind != 'kermany': sys.exit(f'{run} was computed on {kind!r}; the models that come with cxr_lab are those of the study on real images')

if (run/'07_segment'/'lungs.keras').is_file():  # not if the run used the network that is there already
    for name in ('lungs.keras', 'lungs.json'): copy(run/'07_segment'/name, weights/name)

file = weights/'classifier.safetensors'
copy(seed/'model.safetensors', file)
network, info = load_model(file)
data = training_data(run)
train = data.index[data.index.split == 'train']
write_json(file.with_suffix('.json'), dict(
    file=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size, parameters=sum(p.numel() for p in network.parameters()),
    input=[1, info['image_size'], info['image_size']], title='cxr_lab classifier: the small network of the committed study, trained with augmentation',
    trained_on=f'{kind}: {len(train)} images of {train.patient.nunique()} patients', data=ATTRIBUTION.split('; lung outlines')[0], licence='CC BY 4.0',
    **{k: info[k] for k in ('classes', 'threshold', 'aspect', 'scaling', 'recipe', 'best_epoch')}, threshold_rule='largest Youden index on validation', made_by='lesson 04_augment, first seed',
    scores={k: v for k, v in read_metrics(seed/'metrics.json').items() if k.startswith(('val_', 'test_')) or k == 'n'}, intended=INTENDED, limits=LIMITS))

learn_usual(file, data)
for shipped in weights.iterdir(): shipped.chmod(0o644)  # safetensors writes files that only their owner may read
print(*(f'{p.name}  {p.stat().st_size/1e6:.2f} MB' for p in sorted(weights.iterdir())), sep='\n')
