"""What all tests share: shapes that do not match by chance raise, and so do warnings.

That warnings are errors is set in pyproject.toml, where pytest reads it before any import.
"""

import gc
import os
import shutil
import tempfile

import jax
import pytest

# Programs are traced into some million objects, which a collection finds all in use.
gc.set_threshold(100_000, 20, 50)

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Parity is measured in float32 proper, also on accelerators that would round matrix products.
jax.config.update('jax_default_matmul_precision', 'highest')
# Most of a test's time is compiling: without LLVM's passes for fast code it is two thirds of that.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # and of the processes that tests start
# One module for LLVM, and XLA's older emitters of loops, while there are any, halve it again.
FLAGS = ['--xla_cpu_parallel_codegen_split_count=1']
if jax.__version_info__ < (0, 11):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
# The files that take longest, by `--durations`. One of them begun last would keep one worker busy
# and leave the others with nothing to do.
LONGEST = (
  'test_emoji_training',
  'test_notebooks',
  'test_stream_training',
  'test_sharded_sampling',
  'test_tuning',
  'test_bench',
  'test_sharded_training',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest files come first, and tests of programs for CPUs are of no other device.

  What compilers for GPUs make of so small a program is another one: fewer products, say.
  """
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
  if jax.default_backend() == 'cpu':
    return
  for item in items:
    if item.get_closest_marker('cpu_program'):
      item.add_marker(pytest.mark.skip(reason='is about what XLA makes of a program for CPUs'))


def pytest_configure(config: pytest.Config) -> None:
  """Programs are compiled once for all tests of a process.

  Those that it starts have none of it: one that is killed may leave half of a program.
  """
  if hasattr(config.option, 'loadscopereorder'):
    config.option.loadscopereorder = False  # pytest-xdist's own order: files of few tests last
  folder = tempfile.mkdtemp(prefix='unclip_jax_programs_')
  config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@pytest.fixture(scope='module', autouse=True)
def _programs_are_dropped():
  """A process may map some 65,000 pieces of memory; each program takes a handful, and stays."""
  jax.config.update('jax_enable_compilation_cache', True)  # which --no-cache turns off for good
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def _leave_the_cache_as_it_is():
  """The option --no-cache turns it off for the whole process."""
  enabled = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update('jax_enable_compilation_cache', enabled)
