"""Zero-shot classification against loops over pictures and prompts."""

import numpy as np
import pytest

from unclip_jax.evaluate.zero_shot import class_embeddings, fill_templates, zero_shot_accuracy
from unclip_jax.types import UnclipError

TEMPLATES = ('a photo of a {}.', '{}', 'a {} in the style of a {}')


def test_prompts_of_a_class_stand_together():
  assert fill_templates(TEMPLATES, ['cat', 'red {apple}']) == [
    'a photo of a cat.',
    'cat',
    'a cat in the style of a cat',
    'a photo of a red {apple}.',
    'red {apple}',
    'a red {apple} in the style of a red {apple}',
  ]


def test_a_class_is_the_mean_direction_of_its_prompts():
  z_t = np.random.default_rng(0).normal(size=(12, 5)) * np.arange(1, 13)[:, None]
  found = class_embeddings(z_t, 4)
  assert found.shape == (4, 5) and found.dtype == np.float32
  for i in range(4):
    total = sum(z / np.sqrt((z**2).sum()) for z in z_t[3 * i : 3 * i + 3])
    np.testing.assert_allclose(found[i], total / np.sqrt((total**2).sum()), rtol=1e-5)


def test_accuracy_is_how_often_the_class_is_among_the_nearest_over_all_batches():
  draw = np.random.default_rng(0)
  classes = class_embeddings(draw.normal(size=(9, 6)), 9)
  labels = draw.integers(9, size=40)
  z_i = classes[labels] + 0.8 * draw.normal(size=(40, 6))
  places = [sorted(range(9), key=lambda c, z=z: -(z @ classes[c])) for z in z_i]
  wanted = {
    f'top_{k}': np.mean([label in place[:k] for label, place in zip(labels, places, strict=True)])
    for k in (1, 2, 5)
  }
  assert 0.2 < wanted['top_1'] < wanted['top_2'] < wanted['top_5'] < 1
  batches = ((z_i[a:b], labels[a:b]) for a, b in ((0, 7), (7, 8), (8, 40)))
  assert zero_shot_accuracy(batches, classes, (1, 2, 5)) == pytest.approx(wanted)
  # The length of an image's embedding does not matter; fewer classes than k are all among them.
  few = zero_shot_accuracy([(17 * z_i, labels)], classes)
  assert few == pytest.approx({'top_1': wanted['top_1'], 'top_5': wanted['top_5']})
  assert zero_shot_accuracy([(np.eye(2), [0, 1])], np.eye(2)) == {'top_1': 1.0, 'top_5': 1.0}


@pytest.mark.parametrize('value', [1.0, 0.0, np.nan])
def test_embeddings_that_are_all_alike_classify_nothing(value):
  nothing = {'top_1': 0.0, 'top_5': 0.0}
  labels = np.arange(4)
  classes = class_embeddings(np.full((8, 3), value), 8)
  assert zero_shot_accuracy([(np.ones((4, 3)), labels)], classes) == nothing
  classes = class_embeddings(np.eye(8), 8)
  assert zero_shot_accuracy([(np.full((4, 8), value), labels)], classes) == nothing


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: fill_templates(['a photo'], ['cat']), "template 'a photo': it has no {}"),
    (lambda: fill_templates([], ['cat']), 'at least one template'),
    (lambda: fill_templates(['{}'], []), 'at least one template and one name'),
    (lambda: class_embeddings(np.ones((7, 2)), 3), '7 prompts are not equally many for each of 3'),
    (lambda: class_embeddings(np.ones((0, 2)), 0), '0 prompts are not equally many'),
    (lambda: zero_shot_accuracy([], np.eye(2)), 'no pictures to classify'),
    (lambda: zero_shot_accuracy([(np.eye(2), [0, 2])], np.eye(2)), 'labelled 2, and there are 2'),
    (lambda: zero_shot_accuracy([(np.eye(2), [0, -1])], np.eye(2)), 'labelled -1'),
  ],
)
def test_what_makes_no_sense_is_named(call, message):
  with pytest.raises(UnclipError, match=message):
    call()
