"""Commands within the process of a test, so that nothing compiles twice."""

from unclip_jax.cli import main


def run(*args: object) -> int:
  """The exit status of a command."""
  try:
    main([str(arg) for arg in args])
  except SystemExit as stop:
    return stop.code or 0
  return 0
