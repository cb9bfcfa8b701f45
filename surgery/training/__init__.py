"""Joint training with interleaved evolutionary alignment (MUiR, Algorithm 2).

tasks, streams, losses, metrics   what a member is trained to do, on what, and how well it does it
config, starts, evolution         the alignment a run begins with, and one generation's changes to it
optimizers, trainer               one step, one generation
mixing, mixture_pictures          templates while they are trained
sharing_adapters                  what members have in common beside blocks
transfer, trial, adaptation       a new task, or another domain, from templates that are there
train, run, state, runlog         from the start to the end: judged, logged, saved, resumed
"""
