"""Packages are found: every folder of `surgery`, and two that lie under other names. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["surgery", "surgery.*"]), "surgery_cli", "surgery_recipes"])
