"""Names of models of a hub, and which files of a repository are taken."""

from pathlib import Path

import pytest

from unclip_jax.systems.loading import find_folder
from unclip_jax.weights import hub
from unclip_jax.weights.hub import choose, is_hub_id

ROOT = Path(__file__).parent.parent
TOKEN, SIGNATURE = 'hf_OpenSesameOpenSesame', 'X-Signature-AliBaba'


# --- Names.


@pytest.mark.parametrize(
  'name', ['a/b', 'Open-AI/clip-vit_1.5', 'a/b@main', 'a/b@v1.0-rc+2', f'a/b@{"0" * 40}', '1/2']
)
def test_names_that_a_hub_may_have(name):
  assert is_hub_id(name)


@pytest.mark.parametrize(
  'name',
  [
    *(
      '',
      'a',
      'a/',
      '/b',
      '/a/b',
      '~/b',
      './b',
      '../b',
      'a/..',
      'a/b/c',
      'a/b@c/d',
      'a\\b',
      'a\\b/c',
    ),
    *('a/b@', 'a/b@@c', 'a/b@..', 'a/b@-c', 'a/b c', 'a/b\n', 'a/.b', 'a/b.', '-a/b', 'a--b/c'),
    *('a/b..c', 'a/b.git', 'gs://a', 'gs://a/b', 'http://a/b', 'C:/b', 'é/b', f'a/{"b" * 97}'),
  ],
)
def test_names_that_no_hub_has(name):
  assert not is_hub_id(name)


def test_a_folder_wins_over_a_hub(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  asked = []
  monkeypatch.setattr(hub, 'download', lambda model: asked.append(model) or 'downloaded')
  for name in ('acme/tiny', 'acme/tiny@v1'):
    assert find_folder(name) == 'downloaded'
    Path(name).mkdir(parents=True)
    assert str(find_folder(name)) == name
  assert asked == ['acme/tiny', 'acme/tiny@v1']
  assert str(find_folder(Path('acme/huge'))) == 'acme/huge'
  assert str(find_folder('./acme/huge')) == 'acme/huge'
  assert len(asked) == 2


# --- Which files.


def names(text: str) -> list[str]:
  return text.split()


KARLO = names("""
  .gitattributes README.md model_index.json decoder/config.json
  decoder/diffusion_pytorch_model.bin decoder/diffusion_pytorch_model.safetensors
  decoder_scheduler/scheduler_config.json prior/config.json prior/diffusion_pytorch_model.bin
  prior/diffusion_pytorch_model.safetensors super_res_first/config.json
  super_res_first/diffusion_pytorch_model.bin super_res_first/diffusion_pytorch_model.safetensors
  text_encoder/config.json text_encoder/model.safetensors text_encoder/pytorch_model.bin
  text_proj/config.json text_proj/diffusion_pytorch_model.bin tokenizer/merges.txt
  tokenizer/vocab.json assets/example.png
""")
KARLO_LEFT_OUT = names("""
  .gitattributes README.md decoder/diffusion_pytorch_model.bin prior/diffusion_pytorch_model.bin
  super_res_first/diffusion_pytorch_model.bin text_encoder/pytorch_model.bin assets/example.png
""")
KANDINSKY = names("""
  README.md model_index.json movq/config.json movq/diffusion_pytorch_model.fp16.safetensors
  movq/diffusion_pytorch_model.safetensors scheduler/scheduler_config.json unet/config.json
  unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.safetensors
  image_encoder/config.json image_encoder/pytorch_model.bin prior/config.json
  prior/diffusion_pytorch_model.fp16.safetensors prior/openvino_model.bin prior/openvino_model.xml
""")
KANDINSKY_LEFT_OUT = names("""
  README.md movq/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin
  prior/openvino_model.bin prior/openvino_model.xml
""")
STABLE = names("""
  README.md model_index.json sd21-unclip-h.ckpt sd21-unclip-l.ckpt sd21-unclip-l.safetensors
  feature_extractor/preprocessor_config.json image_encoder/config.json
  image_encoder/model.fp16.safetensors image_encoder/model.safetensors
  image_encoder/pytorch_model.bin image_encoder/pytorch_model.fp16.bin image_normalizer/config.json
  image_normalizer/diffusion_pytorch_model.bin image_normalizer/diffusion_pytorch_model.fp16.bin
  unet/config.json unet/diffusion_pytorch_model.non_ema.safetensors
  unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.non_ema.bin
  tokenizer/special_tokens_map.json vae/config.json vae/diffusion_pytorch_model.fp16.bin
  vae/diffusion_pytorch_model.fp16.safetensors
""")
STABLE_LEFT_OUT = names("""
  README.md sd21-unclip-h.ckpt sd21-unclip-l.ckpt sd21-unclip-l.safetensors
  image_encoder/model.fp16.safetensors image_encoder/pytorch_model.bin
  image_encoder/pytorch_model.fp16.bin image_normalizer/diffusion_pytorch_model.fp16.bin
  unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.non_ema.bin
  vae/diffusion_pytorch_model.fp16.bin
""")
CLIP = names("""
  README.md config.json flax_model.msgpack flax_model.msgpack.index.json merges.txt
  model.safetensors preprocessor_config.json pytorch_model.bin tf_model.h5 tf_model.h5.index.json
  tokenizer.json training_args.bin vocab.json onnx/model.onnx onnx/model.safetensors
  checkpoint-5/unet/model.safetensors checkpoint-5/unet/config.json
""")
CLIP_LEFT_OUT = names("""
  README.md flax_model.msgpack flax_model.msgpack.index.json pytorch_model.bin tf_model.h5
  tf_model.h5.index.json training_args.bin onnx/model.onnx onnx/model.safetensors
  checkpoint-5/unet/model.safetensors checkpoint-5/unet/config.json
""")
SHARDS = names("""
  config.json pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin
  pytorch_model.bin.index.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors
  model.safetensors.index.json model.fp16-00001-of-00002.safetensors
  model.fp16-00002-of-00002.safetensors model.safetensors.index.fp16.json
""")
FP16_SHARDS = names("""
  model_index.json unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors
  unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors
  unet/diffusion_pytorch_model.fp16.safetensors.index.json
  prior/diffusion_pytorch_model-00001-of-00002.safetensors
  prior/diffusion_pytorch_model.safetensors prior/diffusion_pytorch_model.safetensors.index.json
""")
OPEN_CLIP = names("""
  .gitattributes README.md open_clip_config.json open_clip_model.safetensors
  open_clip_pytorch_model.bin merges.txt tokenizer.json vocab.json
""")
OURS = names("""
  README.md unclip.json tokenizer.json vocabulary.json clip.safetensors decoder.fp16.safetensors
  decoder.safetensors prior.safetensors upsampler_0.safetensors old/prior.safetensors state.bin
""")

LEFT_OUT = {
  'Karlo': (KARLO, KARLO_LEFT_OUT),
  'Kandinsky 2.2': (KANDINSKY, KANDINSKY_LEFT_OUT),
  'stable unCLIP': (STABLE, STABLE_LEFT_OUT),
  'CLIP of transformers': (CLIP, CLIP_LEFT_OUT),
  'CLIP in pickles': (['config.json', 'pytorch_model.bin', 'model.onnx'], ['model.onnx']),
  'several files': (SHARDS, [*SHARDS[1:4], *SHARDS[7:]]),
  'several files of pickles': (SHARDS[:4], []),
  'one file besides several': (['model.safetensors', *SHARDS], SHARDS[1:]),
  'float16 alone': (FP16_SHARDS, [FP16_SHARDS[4], FP16_SHARDS[6]]),
  'open_clip': (OPEN_CLIP, [*OPEN_CLIP[:2], 'open_clip_pytorch_model.bin']),
  'open_clip and transformers': (
    [*OPEN_CLIP, 'config.json', 'model.safetensors'],
    [*OPEN_CLIP[:2], 'open_clip_pytorch_model.bin', 'model.safetensors'],
  ),
  'open_clip in pickles and transformers': (
    [*OPEN_CLIP[4:], *OPEN_CLIP[2:3], 'config.json', 'model.safetensors', 'pytorch_model.bin'],
    ['open_clip_pytorch_model.bin', 'pytorch_model.bin'],
  ),
  'open_clip and transformers in pickles': (
    [*OPEN_CLIP[2:3], *OPEN_CLIP[4:], 'config.json', 'pytorch_model.bin'],
    ['pytorch_model.bin'],
  ),
  'open_clip and a config': ([*OPEN_CLIP[2:4], 'config.json'], []),
  'ours': (OURS, ['README.md', 'state.bin']),
  'one checkpoint': (['README.md', 'ViT-L-14.pt'], ['README.md']),
  'checkpoints of Karlo': (
    ['README.md', 'prior-ckpt-step=01.ckpt', 'ViT-L-14_stats.th', 'old/prior.ckpt'],
    ['README.md', 'old/prior.ckpt'],
  ),
  'nothing': (
    ['README.md', 'train.csv', 'images/1.png'],
    ['README.md', 'train.csv', 'images/1.png'],
  ),
}


@pytest.mark.parametrize('what', LEFT_OUT)
def test_of_all_files_those_are_taken_that_are_read(what):
  listed, left_out = LEFT_OUT[what]
  assert set(left_out) <= set(listed)
  assert choose(listed) == [name for name in listed if name not in left_out]
  assert sorted(choose(listed[::-1])) == sorted(choose(listed))
