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


def test_scenes_have_four_places_and_their_own_pictures(sprites):
  scenes = held_out.scenes(sprites, *DOMAIN, 30)
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
  for shown in ('sprite_index', 'second_index'):  # one object twice is not the two asked for
    twice = [t._replace(sprite_index=getattr(t, shown)) for t in asked]
    twice = [t._replace(second_index=t.sprite_index) for t in twice]
    bound, _ = measures.is_bound(held_out.real_pictures(sprites, twice, 64), real, asked)
    assert bound[distinct].mean() < 0.1
  gone = real.copy()
  for image, truth in zip(gone, asked, strict=True):
    image[:, :] = captions.COLOURS[captions.COLOUR_NAMES[truth.background]]
  assert not measures.is_bound(gone, real, asked)[0].any()
  with pytest.raises(UnclipError, match='one object of style'):
    held_out.scenes(sprites, ('flat',), (), ('rocket',), 2)


def test_galleries_differ_in_the_object_alone(sprites, gallery):
  truth = gallery.truths[0]
  words = (sprites.style[truth.sprite_index], captions.COLOUR_NAMES[truth.background])
  alike = held_out.captions_on_same_ground(sprites, gallery, truth)
  assert alike[0] == truth.caption and len(set(alike)) == len(gallery.truths)
  assert all(word in caption for caption in alike for word in words)
  own, other = held_out.in_styles(sprites, truth, ('flat', '3d'))
  ours, theirs = words[0], ({'flat', '3d'} - {words[0]}).pop()
  assert own == truth.caption and own.replace(ours, theirs) == other
  truths, indices = held_out.in_another_style(sprites, gallery.truths, ('flat', '3d'))
  assert 20 < len(indices) <= len(gallery.truths)
  for shown, i in zip(truths, indices, strict=True):
    asked = gallery.truths[i].sprite_index
    assert sprites.concept[shown.sprite_index] == sprites.concept[asked]
    assert sprites.style[shown.sprite_index] != sprites.style[asked]
    assert sprites.split[shown.sprite_index] == 'train'
  real = held_out.real_pictures(sprites, gallery.truths[:5], 48)
  moved = held_out.moved(sprites, gallery.truths[:5], 48)
  assert (moved != real).any(axis=(1, 2, 3)).all()
  assert {held_out.other_background(i) for i in range(12)} == set(range(12))
  assert all(held_out.other_background(i) != i for i in range(12))


def test_a_picture_without_a_generator_is_where_it_belongs(sprites):
  truth = Truth('', 0, 0, False, 0, 0)
  still, again = draw(sprites, truth, 48), draw(sprites, truth, 48)
  np.testing.assert_array_equal(still, again)
  moved = draw(sprites, truth, 48, np.random.default_rng(0))
  assert (moved != still).any()
