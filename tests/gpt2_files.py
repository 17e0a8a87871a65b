"""A small vocabulary of GPT-2's kind: the bytes, what a few merges make of them, and its end."""

import json

from tokenizers import pre_tokenizers

END = '<|endoftext|>'
MERGES = (
  *('Ġ a', 'c a', 'ca t', 'Ġ cat', 'd o', 'do g', 'Ġ dog', "' s", 'i n', 'Ġ in', 'Ġ t', 'Ġt h'),
  *('Ġth e', 'r e', '1 2', 'Ġ 1', '! !', 'Ï ĥ', 'Ï Ĥ', 'Ġ Ġ', 'ĠĠ ĠĠ', 'a t'),
)


def make_vocab(merges=MERGES):
  tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
  tokens += [*(merge.replace(' ', '') for merge in merges), END]
  return {token: index for index, token in enumerate(tokens)}


def write(folder, merges=MERGES, names=('vocab.json', 'merges.txt')):
  """The files, as transformers calls them unless asked otherwise."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / names[0]).write_text(json.dumps(make_vocab(merges)), encoding='utf-8')
  lines = ['#version: 0.2', *merges, '']
  (folder / names[1]).write_text('\n'.join(lines), encoding='utf-8')
  return folder
