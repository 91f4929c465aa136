"A map's ingredients, shared by the tests of lesson 09 and of the page that turns it."
import numpy as np
import pytest
import torch

from cxr_lab.model import build_model
from cxr_lab.explorable import embedding_table
from cxr_lab.tsne import embed

@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return build_model('small').eval()

@pytest.fixture(scope='module')
def table(tiny, small):
    subtype = np.where(np.arange(len(tiny.index)) % 2, 'virus', 'bacteria')
    index = tiny.index.assign(subtype=np.where(tiny.index.label == 1, subtype, ''))
    proportion = np.where(np.arange(len(index)) % 10, np.linspace(.7, 1.2, len(index)), np.nan)
    return embedding_table(index, *embed(small, tiny.pixels)).assign(proportion=proportion)
