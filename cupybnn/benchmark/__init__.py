"""Time the 1-bit product against dense products: what ``cupybnn bench`` runs.

`record.run` measures and returns a plain dict (the JSON file); `tables` formats it for a terminal,
`chart` draws it.
"""
