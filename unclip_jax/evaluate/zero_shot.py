"""Zero-shot classification by CLIP's embeddings (Radford et al. 2021, section 3.1)."""

from collections.abc import Iterable, Sequence

import numpy as np

from unclip_jax.types import Array, UnclipError


def fill_templates(templates: Sequence[str], names: Sequence[str]) -> list[str]:
  """The prompts of all classes, those of a class together: [len(names) * len(templates)].

  Args:
    templates: such as 'a photo of a {}.'.
    names: of the classes, put in the place of '{}'.

  Raises:
    UnclipError: there is no template or no name, or a template has no place for the name.
  """
  if not templates or not names:
    raise UnclipError('classes are told by at least one template and one name')
  for template in templates:
    if '{}' not in template:
      raise UnclipError(f'template {template!r}: it has no {{}} where the name of a class goes')
  return [template.replace('{}', name) for name in names for template in templates]


def class_embeddings(z_t: Array, num_classes: int) -> np.ndarray:
  """One embedding a class: the mean of its prompts', each and the mean of unit norm (3.1.4).

  Args:
    z_t: [num_classes * k, d] embeddings of the prompts of `fill_templates`.
    num_classes: how many.

  Returns:
    float32 [num_classes, d].

  Raises:
    UnclipError: the prompts are not equally many for each class.
  """
  z_t = np.asarray(z_t, np.float32)
  if num_classes < 1 or not len(z_t) or len(z_t) % num_classes:
    raise UnclipError(f'{len(z_t)} prompts are not equally many for each of {num_classes} classes')
  per_prompt = _unit(z_t).reshape(num_classes, -1, z_t.shape[1])
  return _unit(per_prompt.mean(axis=1))


def zero_shot_accuracy(
  batches: Iterable[tuple[Array, Array]], classes: Array, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
  """How often the right class is among the k nearest to a picture.

  Args:
    batches: image embeddings [b, d] of any norm, and the rows of `classes` that they belong to,
      int [b]; b may differ.
    classes: of `class_embeddings`, [n, d].
    ks: each gives a figure; a class that is as near as the right one counts as nearer.

  Returns:
    {'top_1': share in [0, 1], 'top_5': ...}.

  Raises:
    UnclipError: there are no pictures, or a label is of no class.
  """
  classes = np.asarray(classes, np.float32)
  ranks: list[np.ndarray] = []
  for z_i, labels in batches:
    labels = np.asarray(labels)
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if wrong.size:
      raise UnclipError(f'a picture is labelled {wrong[0]}, and there are {len(classes)} classes')
    scores = np.asarray(z_i, np.float32) @ classes.T
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # The right class itself makes it 1 or more; what is not a number is behind all others.
    ranks.append((~(scores < own)).sum(axis=1))
  rank = np.concatenate(ranks) if ranks else np.zeros(0)
  if not rank.size:
    raise UnclipError('there are no pictures to classify')
  return {f'top_{k}': float((rank <= k).mean()) for k in ks}


def _unit(rows: np.ndarray) -> np.ndarray:
  # Rows of zeros stay what they are: as near to one picture as to another.
  return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
