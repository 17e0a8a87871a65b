"""Writes format_v1/, a model folder as version 1 of the format describes it, byte by byte.

Only the standard library: neither our writer nor the safetensors package takes part, so that the
test that opens it does not compare the program with itself. Run once; the output is committed.
"""

import json
import struct
from pathlib import Path

FOLDER = Path(__file__).parent / 'format_v1'

# name -> (type, shape, values). The values are exact in their type.
PRIOR = {
  'blocks_0.attention.kernel': ('F32', [2, 3], [0.5, -1.25, 2.0, 3.5, -0.75, 1.0]),
  'blocks_0.norm.scale': ('BF16', [3], [1.0, 0.5, -1.5]),
  'statistics.count': ('I32', [], [7]),
}
DECODER = {'out.bias': ('F16', [2], [0.25, -8.0])}


def pack(kind: str, values: list[float]) -> bytes:
  if kind == 'BF16':  # The upper half of a float32.
    return b''.join(struct.pack('<f', value)[2:] for value in values)
  return struct.pack(f'<{len(values)}' + {'F32': 'f', 'F16': 'e', 'I32': 'i'}[kind], *values)


def safetensors(tensors: dict[str, tuple[str, list[int], list[float]]]) -> bytes:
  header, body = {}, b''
  for name, (kind, shape, values) in tensors.items():
    start, body = len(body), body + pack(kind, values)
    header[name] = {'dtype': kind, 'shape': shape, 'data_offsets': [start, len(body)]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text + body


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  manifest = {
    'format_version': 1,
    'written_by': 'make_format_v1.py',
    'config': {'prior': {'width': 3}, 'decoder': {'channels': [1, 2]}},
    'stages': {'prior': 'prior.safetensors', 'decoder': 'decoder.safetensors'},
    'tokenizer': 'tokenizer.json',
  }
  tokenizer = {
    'version': '1.0',
    'model': {'type': 'WordLevel', 'vocab': {'<pad>': 0, '<end>': 1, 'apple': 2}, 'unk_token': ''},
  }
  (FOLDER / 'unclip.json').write_text(json.dumps(manifest, indent=2) + '\n')
  (FOLDER / 'tokenizer.json').write_text(json.dumps(tokenizer) + '\n')
  (FOLDER / 'prior.safetensors').write_bytes(safetensors(PRIOR))
  (FOLDER / 'decoder.safetensors').write_bytes(safetensors(DECODER))


if __name__ == '__main__':
  main()
