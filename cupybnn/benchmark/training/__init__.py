"""Time training steps against the same network in PyTorch: what ``cupybnn bench train`` runs.

`record.run` measures and returns a plain dict (the JSON file); `tables` formats it for a terminal,
`chart` draws it. `ours` and `peer` define the steps of the two libraries, `variants` measures one.
"""
