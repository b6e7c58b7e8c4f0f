"""Time training steps against the same network in PyTorch: what ``cupybnn bench train`` runs.

`record.run` measures and returns a plain dict (the JSON file); `tables` writes it on a terminal,
`chart` draws it. `ours` and `peer` have the steps of the two libraries, `variants` how one is
measured.
"""
