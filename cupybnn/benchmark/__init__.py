"""Time the 1-bit product against dense products: what ``cupybnn bench`` runs.

`record.run` measures and returns a plain dict (the JSON file); `tables` writes it on a terminal,
`chart` draws it.
"""
