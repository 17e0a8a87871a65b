"""The notebooks run from top to bottom, as a reader would run them."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  notebook = nbformat.read(path, as_version=4)
  assert all(not cell.get('outputs') for cell in notebook.cells), 'commit it without outputs'
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
  assert any(
    'image/png' in output.get('data', {}) for c in notebook.cells for output in c.get('outputs', [])
  )


def test_there_are_notebooks():
  assert NOTEBOOKS
