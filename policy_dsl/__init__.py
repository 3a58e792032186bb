"""The front end: policy texts and checkpoints to plans, without numpy and without formats."""
