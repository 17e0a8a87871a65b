"""Held-out captions and the plain measures, on pictures whose truth is known."""

import numpy as np
import pytest

from experiments.emoji import captions, held_out, measures
from experiments.emoji.compose import Truth, draw, load_sprites
from unclip_jax.types import UnclipError

DOMAIN = (('flat', '3d'), ('food-drink', 'animals-nature'), ('rocket',))


@pytest.fixture(scope='module')
def sprites():
  return load_sprites(None)


@pytest.fixture(scope='module')
def gallery(sprites):
  return held_out.make_gallery(sprites, *DOMAIN, size=120)


def test_gallery_asks_for_held_out_pairs_one_a_concept(sprites, gallery):
  asked = [t.sprite_index for t in gallery.truths[: gallery.num_asked]]
  others = [t.sprite_index for t in gallery.truths[gallery.num_asked :]]
  assert len(asked) > 20 and len(asked) + len(others) == 120
  assert set(sprites.split[asked]) == {'val_pairs'} and set(sprites.split[others]) == {'train'}
  concepts = sprites.concept[[*asked, *others]]
  assert len(set(concepts)) == 120 == len(set(gallery.captions))
  assert set(sprites.style[asked]) == {'flat', '3d'}
  again = held_out.make_gallery(sprites, *DOMAIN, size=60)
  assert again.captions[:30] == gallery.captions[:30]
  assert len({t.background for t in gallery.truths}) == len(captions.COLOUR_NAMES)
  for truth in gallery.truths:
    for word in (sprites.label[truth.sprite_index], sprites.style[truth.sprite_index]):
      assert word in truth.caption
    assert captions.COLOUR_NAMES[truth.background] in truth.caption
  with pytest.raises(UnclipError, match='no pair of val_pairs'):
    held_out.make_gallery(sprites, ('twemoji',), ('flags',), ())


def test_real_pictures_are_perfect_and_others_are_not(sprites, gallery):
  truths = gallery.truths[:20]
  real = held_out.real_pictures(sprites, truths, 64)
  assert measures.has_background(real, truths).all()
  np.testing.assert_array_equal(measures.silhouette_overlap(real, real, truths), 1)
  np.testing.assert_array_equal(measures.colour_distance(real, real, truths), 0)
  elsewhere = [t._replace(background=held_out.other_background(t.background)) for t in truths]
  moved = held_out.real_pictures(sprites, elsewhere, 64)
  assert not measures.has_background(moved, truths).any()
  assert measures.has_background(moved, elsewhere).all()
  other_objects = held_out.real_pictures(
    sprites, [t._replace(background=truths[0].background) for t in gallery.truths[20:40]], 64
  )
  same = [t._replace(background=truths[0].background) for t in truths]
  real = held_out.real_pictures(sprites, same, 64)
  overlap = measures.silhouette_overlap(other_objects, real, same)
  assert overlap.mean() < 0.8
  assert measures.colour_distance(other_objects, real, same).mean() > 30


def test_background_may_be_12_levels_off():
  truth = Truth('', 0, 0, False, 0, captions.COLOUR_NAMES.index('grey'))
  colour = np.array(captions.COLOURS['grey'])
  for off, fits in ((12, True), (13, False), (-12, True), (-13, False)):
    image = np.broadcast_to(colour + np.array([0, off, 0]), (1, 32, 32, 3)).astype(np.uint8)
    assert measures.has_background(image, [truth])[0] == fits


def test_scenes_have_four_places_and_their_own_pictures(sprites, gallery):
  scenes = held_out.scenes(sprites, gallery, 30)
  asked = [four[0] for four in scenes]
  assert len({t.relation for t in asked}) == 4
  for four in scenes:
    assert sorted(t.relation for t in four) == [0, 1, 2, 3]
    assert len({(t.sprite_index, t.second_index, t.background) for t in four}) == 1
    assert len({t.caption for t in four}) == 4
  real = held_out.real_pictures(sprites, asked, 64)
  bound, distinct = measures.is_bound(real, real, asked)
  assert bound.all() and distinct.mean() > 0.3
  exchanged = [t._replace(relation=t.relation ^ 1) for t in asked]
  bound, distinct = measures.is_bound(held_out.real_pictures(sprites, exchanged, 64), real, asked)
  assert bound[distinct].mean() < 0.1


def test_a_picture_without_a_generator_is_where_it_belongs(sprites):
  truth = Truth('', 0, 0, False, 0, 0)
  still, again = draw(sprites, truth, 48), draw(sprites, truth, 48)
  np.testing.assert_array_equal(still, again)
  moved = draw(sprites, truth, 48, np.random.default_rng(0))
  assert (moved != still).any()
