"A map's ingredients, shared by the tests of lesson 09 and of the page that turns it."
import numpy as np
import pytest
import torch

from cxr_lab.model import build_model
from cxr_lab.tsne import embed, embedding_table

@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return build_model('small').eval()

@pytest.fixture(scope='module')
def table(tiny, small):
    subtype = np.where(np.arange(len(tiny.index)) % 2, 'virus', 'bacteria')
    index = tiny.index.assign(subtype=np.where(tiny.index.label == 1, subtype, ''))
    return embedding_table(index, *embed(small, tiny.pixels))
