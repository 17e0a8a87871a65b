"""The notebooks run from top to bottom, as a reader would run them, two with smaller numbers.

By nbclient, which nbmake is a way to call: here a notebook's settings are changed before it runs,
and what it made is looked at.
"""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / 'notebooks').glob('*.ipynb'))
FROM_SCRATCH = NOTEBOOKS[0].with_name('train_from_scratch.ipynb')

# What is written in a notebook, and what it is run with.
FEWER_STEPS = {'manipulations': ('num_steps=25', 'num_steps=8')}
# In place of the settings of train_from_scratch: every line of it runs, and nothing is learned.
FEWER = {
  'NUM_PRIOR_UPDATES': 4,
  'NUM_DRAFT_UPDATES': 5,
  'NUM_DECODER_UPDATES': 8,
  'NUM_EXAMPLES': 160,
  'SAMPLING_STEPS': 2,
}
# Appended to it.
PROBE = """
import json

histories = prior_history, draft_history, decoder_history
report = {
  'updates': [len(history['loss']) for history in histories],
  'finite': all(np.isfinite(history['loss']).all() for history in histories),
  'looks': [list(cosines), list(rows)],
  'contrasts': [int(np.ptp(pictures)) for pictures in rows.values()],
}
print(json.dumps(report, default=bool))
"""


@pytest.fixture(scope='module', autouse=True)
def _programs_are_shared(tmp_path_factory):
  """The notebooks draw with one model: what one of them has compiled the next one finds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('programs')))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield


def run(notebook):
  """Executes it; returns how many of its outputs are pictures."""
  assert all(not cell.get('outputs') for cell in notebook.cells), 'commit it without outputs'
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  return sum('image/png' in output.get('data', {}) for output in outputs)


@pytest.mark.parametrize(
  'path', [path for path in NOTEBOOKS if path != FROM_SCRATCH], ids=lambda path: path.stem
)
def test_notebook_runs(path):
  notebook = nbformat.read(path, as_version=4)
  if path.stem in FEWER_STEPS:
    written, fewer = FEWER_STEPS[path.stem]
    (cell,) = (cell for cell in notebook.cells if written in cell.source)
    cell.source = cell.source.replace(written, fewer)
  assert run(notebook)


def test_train_from_scratch_runs():
  notebook = nbformat.read(FROM_SCRATCH, as_version=4)
  settings = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  for name, value in FEWER.items():
    settings.source, count = re.subn(rf'(?m)^{name} = \d+', f'{name} = {value}', settings.source)
    assert count == 1, name
  notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
  assert run(notebook) == 5  # data, prior, samples, losses, from captions
  report = json.loads(notebook.cells[-1].outputs[-1].text)
  assert report['updates'] == [4, 5, 8]
  assert report['finite']
  assert report['looks'] == [[0, 1, 2, 3, 4], [f'{step} updates' for step in (0, 2, 4, 6, 8)]]
  # The U-Net's last convolution starts at zero: only what was trained draws something.
  assert report['contrasts'][0] == 0 < report['contrasts'][-1]


def test_there_are_notebooks():
  assert FROM_SCRATCH in NOTEBOOKS and len(NOTEBOOKS) > 1
