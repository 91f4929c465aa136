"What an object says of itself is short, and says what it is."
from cxr_lab.predict import Explained, Predictor
from cxr_lab.sweep import Node, Plan, Point


def test_a_predictor_names_its_model_threshold_and_device():
    said = repr(Predictor.load(device='cpu', threshold=.25))
    assert said == 'Predictor(classifier.safetensors: small for 128 px, PNEUMONIA from 0.25 on (given), cpu)'
    unusual = repr(Predictor.load(device='cpu').unusual)
    assert unusual.startswith('Unusual(embedding, layout, like a phantom, ') and len(unusual) < 120

def test_an_answer_shows_no_arrays():
    assert repr(Explained('a.png', error='not an image')) == "Explained('a.png': not an image)"
    told = Explained('a.png', .91234, 'PNEUMONIA', .5, 'a side view?')
    assert repr(told) == "Explained('a.png': PNEUMONIA, 0.912; a side view?)"

def test_a_plan_counts():
    node = Node('nbs/03_train.ipynb', 'abc', {}, {}, {}, {})
    point = Point('lr=0.1', {'lr': .1}, {}, {'03_train': 'abc'})
    other = Point('lr=0.2', {'lr': .2}, {}, {'03_train': 'abc'})
    plan = Plan([node.path], {}, {'abc': node}, [point, other])
    assert [repr(o) for o in (node, point, plan)] == [
        'Node(03_train-abc)', 'Point(lr=0.1)', 'Plan(2 points, 1 executions of notebooks, 1 saved)']
