"""The fleet: thousands of simulated devices over real sockets, and a report people can trust.

config.py     what to simulate
pacing.py     when each inference is due, and on which device: pure functions of a seed
workload.py   what a device asks and what answer is right: bundle (real) or echo (load test)
inputs.py     the bundle workload's ingredients, computed once per process
stock.py      groups mixed and encoded once, to be sent many times
prepare.py    makes a stock of a bundle
shared.py     memory without a name, one copy for all processes
device.py     one device: its stream, and what it has under way
shard.py      one event loop full of devices
process.py    one shard at work, and the words it has with its parent
crew.py       what the parent sees of its shards
processes.py  a crew of spawned processes
result.py     one row per inference, in one array
stats.py      the cloud's own figures, read before, during and after
report.py     all rows -> one Summary
run.py        starts the shards, merges their rows
view.py       the live view in a terminal, and the figures as text
page.py       the report as one HTML file
command.py    ``datamix simulate``
"""
