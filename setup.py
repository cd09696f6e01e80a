"""Packaging, for tools that ask for this file; pyproject.toml holds all that there is to say."""

from setuptools import setup

setup()
