"""The fleet: thousands of simulated devices over real sockets, and a report people can trust.

config.py     what to simulate
arrivals.py   when inferences fall due: eight laws, pure functions of a seed
trace.py      send times from a CSV or Parquet file
pacing.py     the schedule: which device owes which inference, and when
behaviour.py  devices that come and go, storms, slow readers, cancellations
chance.py     numbers that are looked up instead of drawn, the same in any shard
profiles.py   kinds of devices and links (profiles.yaml), and who gets which
links.py      a device's link: how long a message takes
measuring.py  ``datamix profile-device``
stages.py     how long the device's own steps really took
options.py    ``key=value,...`` on the command line
workload.py   what a device asks and what answer is right: bundle (real) or echo (load test)
inputs.py     the bundle workload's ingredients, computed once per process
stock.py      groups mixed and encoded once, to be sent many times
prepare.py    makes a stock of a bundle
shared.py     memory without a name, one copy for all processes
device.py     one device: its stream, and what it has under way
streams.py    the streams of one shard's devices: opened, lost, dropped, left
timers.py     many small waits on one timer
turns.py      a closed loop: what is due once a device has its answer
own_time.py   devices whose processor and link are simulated
shard.py      one event loop full of devices
counters.py   what a shard counts, and what it says in between and at the end
process.py    one shard at work, and the words it has with its parent
crew.py       what the parent sees of its shards
processes.py  a crew of spawned processes
result.py     one row per inference, in one array
stats.py      the cloud's own figures, read before, during and after
quantiles.py  percentiles with their intervals, or none
series.py     a run cut into seconds
waterfall.py  where an inference's time went
summary.py    the figures of a run, and what each means
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
