"""Joint training with interleaved evolutionary alignment (MUiR, Algorithm 2).

train, checking      from members, tasks and settings to a trained joint model; what is wrong with these
tasks/               data, streams, losses, metrics, validation, adaptation
loop/                steps and generations, what methods do in them (`moves`), optimizers, a run's state
report/              the log, the report, pictures
distributed/         processes that each hold a part
"""
