"""What all tests share: shapes that do not match by chance raise, and so do warnings.

That warnings are errors is set in pyproject.toml, where pytest reads it before any import.
"""

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Parity is measured in float32 proper, also on accelerators that would round matrix products.
jax.config.update('jax_default_matmul_precision', 'highest')
