"""The fleet: thousands of simulated devices over real sockets, and a report people can trust.

config.py     what to simulate
pacing.py     when each inference is due, and on which device: pure functions of a seed
workload.py   what a device asks and what answer is right: bundle (real) or echo (load test)
inputs.py     the bundle workload's ingredients, computed once per process
device.py     one device: its stream, and what it has under way
shard.py      one event loop full of devices
process.py    one spawned process with one shard, and the words it has with its parent
result.py     one row per inference, in one array
stats.py      the cloud's own figures, read before, during and after
report.py     all rows -> one Summary
run.py        starts the shards, merges their rows
view.py       the live view in a terminal, and the figures as text
page.py       the report as one HTML file
command.py    ``datamix simulate``
threshold.py  gates on a run's figures, for its exit code

settled.py    what has ended while a run goes on, in the order it was due
objective.py  ``p99=100ms``
bounds.py     binomial bounds of shares and quantiles
verdict.py    whether a load meets an objective: looks, and how much neighbours depend
search.py     which rate next, and what is believed of the capacity
limiting.py   what made inferences late
capacity.py   the search against a running cloud
closed.py     a closed loop, labelled as one
scenario.py   single-stream, multi-stream and offline, as MLPerf defines them
capacity_view.py, capacity_command.py   ``datamix capacity`` and ``datamix scenario``
"""
