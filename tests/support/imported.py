"""What a process of `processes` has imported when it starts: this package, and what others import when first used."""

import functools
import importlib
import pkgutil

import surgery_cli
import typer.main

import surgery

typer.main.get_command = functools.cache(typer.main.get_command)  # as in `conftest`, before others take it

LATE = (
    "accelerate", "jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "sympy",
    "torch._refs", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes", "torchmetrics", "transformers",
)  # fmt: skip

for package in (surgery, surgery_cli):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
for name in ("surgery_cli.__main__", *LATE):
    importlib.import_module(name)
