"""A pointer of Git LFS in place of a text file is named as such, whatever reads the file."""

from pathlib import Path

import pytest
from etils import epath

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest
from unclip_jax.weights.foreign_config import read_json

POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n'


def of_parent(read):
  return lambda path: read(path.parent)


@pytest.mark.parametrize(
  ('name', 'read'),
  [
    ('config.json', read_json),
    ('unclip.json', of_parent(read_manifest)),
    ('vocabulary.json', Vocabulary.load),
    ('tokenizer.json', Tokenizer.load),
    ('tokenizer.json', of_parent(Tokenizer.from_transformers)),
    ('vocab.json', of_parent(Tokenizer.from_transformers)),
    ('tokenizer.json', of_parent(Tokenizer.from_xlm_roberta)),
    ('sentencepiece.bpe.model', of_parent(Tokenizer.from_xlm_roberta)),
  ],
)
def test_a_pointer_is_named_with_the_remedy(tmp_path: Path, name, read):
  path = epath.Path(tmp_path) / name
  path.write_text(POINTER)
  with pytest.raises(UnclipError) as caught:
    read(path)
  assert str(caught.value) == (
    f'{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder'
  )


def test_merges_that_are_a_pointer_are_named(tmp_path):
  Tokenizer.clip().save_transformers(tmp_path)
  (tmp_path / 'tokenizer.json').unlink(missing_ok=True)
  (tmp_path / 'merges.txt').write_text(POINTER)
  with pytest.raises(UnclipError, match=r'merges\.txt is a pointer of Git LFS'):
    Tokenizer.from_transformers(tmp_path)
