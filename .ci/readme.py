"Executes nbs/index.ipynb, stores its outputs, and makes README.md from it."
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from cxr_lab.report import write_readme
from cxr_lab.runs import atomic_path

os.chdir(Path(__file__).resolve().parents[1])
index = Path('nbs/index.ipynb')
notebook = nbformat.read(index, 4)
os.environ['CXR_LAB_PROGRESS'] = '0'
NotebookClient(notebook, timeout=600, kernel_name='python3', record_timing=False, resources={'metadata': {'path': 'nbs'}},
               extra_arguments=['--log-level=CRITICAL']).execute()
notebook.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}  # as nbdev_clean leaves it
with atomic_path(index) as temporary: nbformat.write(notebook, temporary)
write_readme(index, 'README.md')
