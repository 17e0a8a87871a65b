"""How near the embedded model gives pictures back from their latents."""

import pytest

from experiments.emoji import measure_inversion
from unclip_jax.types import UnclipError


def test_pictures_come_back_within_two_levels(capsys):
  """By a fifth of the paper's 250 steps; a step of an inversion that is not iterated errs more."""
  measure_inversion.main(['--pictures=2', '--steps=50', '--iterations', '1', '2'])
  once, twice = (line.split('|')[3:6] for line in capsys.readouterr().out.splitlines()[4:])
  assert max(map(float, twice)) < 2
  assert float(twice[0]) < 0.5 * float(once[0])


def test_no_pictures_are_refused():
  with pytest.raises(UnclipError, match='--pictures 0: take 1 or more'):
    measure_inversion.main(['--pictures=0'])
