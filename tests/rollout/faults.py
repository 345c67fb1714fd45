"""What may happen to an update of two buckets on its way, and what the engine says."""

from dataclasses import replace

FAULTS = {
    "the first is lost": (
        lambda load: [load] if load.index else [],
        r"bucket 1 of update \d+ \(.* arrived where bucket 0 ",
    ),
    "the last is lost": (lambda load: [] if load.index else [load], "1 buckets of update .* arrived, 2 of "),
    "one comes twice": (lambda load: [load, load], r"bucket 0 of update \d+ \(.* arrived where bucket 1 "),
    "they change places": (
        lambda load: [replace(load, index=1 - load.index)],
        r"bucket 1 of update \d+ \(.* arrived where bucket 0 ",
    ),
    "one is of another update": (
        lambda load: [replace(load, update=load.update - load.index)],
        r"bucket 1 of update (\d+) .* arrived where bucket 1 of (?!\1)\d+ was due",
    ),
}
