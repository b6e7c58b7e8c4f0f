"""What several ranks gain: ``cupybnn bench train --gpus 1,2,4`` and ``--ranks 1,2``."""
