"""Time predictions against the same network in other libraries: what ``cupybnn bench infer`` runs.

`record.run` measures and returns a plain dict (the JSON file); `tables` writes it on a terminal,
`chart` draws it. `network` is what is timed, `ours` and `peers` how each library does it.
"""
