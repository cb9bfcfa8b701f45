"""Joint training with interleaved evolutionary alignment (MUiR, Algorithm 2).

tasks.py, streams.py, losses.py      what a member is trained to do, and on what
starts.py, evolution.py              the alignment a run begins with, and one generation's changes to it
optimizers.py, trainer.py            one step, one generation
"""
