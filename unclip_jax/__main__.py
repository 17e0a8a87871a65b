"""`python -m unclip_jax`: the command line."""

from unclip_jax.cli import main

main()
