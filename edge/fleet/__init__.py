"""The fleet: thousands of simulated devices over real sockets, and a report people can trust.

pacing.py     when each inference is due, and on which device: pure functions of a seed
workload.py   what a device asks and what answer is right: bundle (real) or echo (load test)
device.py     one device: its stream, its reconnects
shard.py      one process full of devices
result.py     one row per inference, in one array
stats.py      the cloud's own figures, read before, during and after
report.py     all rows -> one Summary
run.py        starts the shards, merges their rows
view.py       the live view in a terminal
page.py       the report as one HTML file
"""
