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
quantiles.py  percentiles with their intervals, or none
series.py     a run cut into seconds
waterfall.py  where an inference's time went
report.py     all rows -> one Summary
run.py        starts the shards, merges their rows
store.py      rows on disk: a stream while the run goes, Parquet at its end
recorder.py   the folder of a run
saved.py      a folder -> the run again, whole or cut off
compare.py    two runs: better, worse, no difference seen
view.py       the live view in a terminal, and the figures as text
drawing.py    plots as SVG that a page can colour
plots.py      the plots of a run
load_plots.py the plots of several runs against their load
page.py       the report as one HTML file
command.py    ``datamix simulate``
reporting.py  ``datamix report`` and ``datamix compare``
"""
