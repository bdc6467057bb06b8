"""The search for an architecture: what can a device's budget buy?

budget.py     what a device can afford
space.py      which architectures come into question
costs.py      what each costs, computed before anything is trained
pareto.py     who is beaten by nobody: pure functions
halving.py    who is trained for how long, and who goes on: pure functions
trial.py      one training run, as data: the seam at which any trainer fits
journal.py    finished trials in a file, so that a search goes on where it was killed
children.py   trials in processes of their own
run.py        puts these together
holdout.py    a part of the training split to choose by
training.py   the trainer that is used: a real one
report.py     the outcome as text and JSON
plot.py       the outcome as a picture
command.py    ``datamix train --search``
"""
