"""Joint training with interleaved evolutionary alignment (MUiR, Algorithm 2).

tasks, streams, losses, metrics   what a member is trained to do, on what, and how well it does it
config, starts, evolution         the alignment a run begins with, and one generation's changes to it
optimizers, trainer               one step, one generation
train, run, state, runlog         from the start to the end: judged, logged, saved, resumed
"""
