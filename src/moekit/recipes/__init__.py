"""Recipes: one architecture paper each, as a configuration of the parts in ``nn`` on top of ``base.toml``."""
