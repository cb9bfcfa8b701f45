"""Joint training with interleaved evolutionary alignment (MUiR, Algorithm 2).

tasks, streams, losses, metrics   what a member is trained to do, on what, and how well it does it
config, starts, evolution         the alignment a run begins with, and one generation's changes to it
optimizers, trainer               one step, one generation
mixing, mixture_pictures          templates while they are trained
sharing_private                  what members have in common beside blocks
transfer, trial                   a new task from templates that are there
adaptation, features, domains     another domain from them, without labels
stateful, shared_batches          what losses may have: a state of their own, means over all processes
processes, sharded, fsdp, shards  several processes that each hold everything, or a part
train, run, state, runlog         from the start to the end: judged, logged, saved, resumed
run_plan, interruptions           what a state must agree with to go on, and being asked to stop
running_losses, trackers          what losses come to, and where else they are logged
describing                        the log's first line
"""
