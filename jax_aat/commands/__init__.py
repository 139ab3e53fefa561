"""The commands of ``python -m jax_aat``, one a file: `add_to` adds its parser, `run` runs it."""
